"""Mode that labels results, and in which torch's FakeTensor judges each operation.

An operation on tensors of the card is also run on fake tensors of the labelled devices. torch's own
rules then find tensors that do not meet, results that the host waits for, and results' devices.
Answers are kept by shapes, so that repeated operations cost little.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch._subclasses import fake_tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from megatron_laer.support.torch_version import OLDEST_ON_CUDA
from tests.fake_cuda import findings, labels, streams
from tests.fake_cuda.findings import Kind
from tests.fake_cuda.labels import PINNED, UNKNOWN, Memory, is_card, label, put, torchs_own
from tests.fake_cuda.observing import Observer

_CPU = torch.device("cpu")
_empty_strided = torchs_own(torch.empty_strided)
_NCCL_DTYPES = frozenset(
    {
        *(torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16),
        *(torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2),
    }
)
"""What NCCL takes, but float64, which costs twice the bytes of all that training needs."""

# By a mask, CUDA finds places of elements and the host reads their number.
_BY_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_KERNEL_KEYS = (
    "CUDA",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)


class Answer(NamedTuple):
    """Kind and sentence of a finding, or None, and the memory of each result."""

    found: tuple[Kind, str] | None
    memories: tuple[Memory, ...] | None


class Wanted:
    """Memory that Python's caller of the operation in progress wants for its result."""

    is_given = False
    memory: Memory = None


def _mm_of_dtype(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _addmm_of_dtype(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, **options: Any
) -> torch.Tensor:
    return torch.addmm(bias.to(dtype), a.to(dtype), b.to(dtype), **options)


# Operations that the CPU lacks: other ones with their result, and the first torch that has them.
_OF_CUDA_ALONE: dict[Any, tuple[Callable[..., Any], str]] = {
    torch.ops.aten.mm.dtype_out: (_mm_of_dtype, "2.8"),
    # Before, it refused operands of two dtypes.
    torch.ops.aten.addmm.dtype_out: (_addmm_of_dtype, "2.10"),
}


def _computed(func: Any) -> Callable[..., Any]:
    """Return the function that computes an operation on the CPU; note one that is too new."""
    if func not in _OF_CUDA_ALONE:
        return func  # type: ignore[no-any-return]
    computed, since = _OF_CUDA_ALONE[func]
    if _version(since) > _version(OLDEST_ON_CUDA):
        findings.current.note(Kind.REFUSED, f"{func} needs torch {since}")
    return computed


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


class Oracle(TorchDispatchMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer
        self._fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self._answers: dict[Hashable, Answer] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # judge what it does with this rank's part
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func._schema.name
        if name.startswith("c10d::"):
            _judge_collective(name, given)
            result = func(*args, **kwargs)
            self._observer.saw(func._schema, args, kwargs, result)
            return result
        if name in ("aten::copy_", "aten::_to_copy"):
            return self._copy(func, name, args, kwargs, given)
        answer = self._judge(func, name, args, kwargs, given)
        result = _computed(func)(*args, **kwargs)
        _label_results(given, result, answer.memories)
        self._observer.saw(func._schema, args, kwargs, result)
        if answer.found is not None:
            kind, what = answer.found
            streams.host_waits(what) if kind is Kind.WAIT else findings.current.note(kind, what)
        return result

    def _copy(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
    ) -> torch.Tensor:
        in_place = name == "aten::copy_"
        target, source = given if in_place else (None, given[0])
        before = label(source)
        result: torch.Tensor = func(*args, **kwargs)
        if target is None:
            put(result, Wanted.memory if Wanted.is_given else before)
        elif label(target) == UNKNOWN:
            put(target, before)
        self._observer.saw(func._schema, args, kwargs, result)
        non_blocking = kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2])
        judge_copy(before, label(result), non_blocking=bool(non_blocking))
        return result

    def _judge(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any, given: list[torch.Tensor]
    ) -> Answer:
        memories = [label(tensor) for tensor in given]
        if not any(map(is_card, memories)):
            return Answer(None, None)
        if not _has_kernel(func):
            findings.current.note(Kind.NO_KERNEL, str(func))
        if name in _BY_INDEX and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        ):
            return Answer((Kind.WAIT, f"{func} by a mask"), None)
        leaves, spec = tree_flatten((args, kwargs))
        by_python = Wanted.is_given
        key = (func, by_python, spec, *map(_key, leaves))
        try:
            if key not in self._answers:
                self._answers[key] = self._ask(func, leaves, spec, by_python)
            return self._answers[key]
        except TypeError:  # an argument that is no key
            return self._ask(func, leaves, spec, by_python)

    def _ask(self, func: Any, leaves: list[Any], spec: Any, by_python: bool) -> Answer:
        memories = [label(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        tensors = zip(leaves, memories, strict=True)
        described = [
            f"{leaf.dtype} in {memory or 'host memory'}"
            for leaf, memory in tensors
            if isinstance(leaf, torch.Tensor)
        ]
        what = f"{func} of {', '.join(described)}".replace("torch.", "")
        with _disable_current_modes(), labels.suspended(), self._fake, torch.no_grad():
            try:
                fakes = [_fake(*pair, by_python) for pair in zip(leaves, memories, strict=True)]
                args, kwargs = tree_unflatten(fakes, spec)
                result = func(*args, **kwargs)
            except (
                fake_tensor.DataDependentOutputException,
                fake_tensor.DynamicOutputShapeException,
            ):
                return Answer((Kind.WAIT, str(func)), None)
            except fake_tensor.FakeTensorDeviceMismatchError:
                return Answer((Kind.MISMATCH, what), None)
            except Exception as error:
                kind = Kind.MISMATCH if "same device" in str(error) else Kind.REFUSED
                return Answer((kind, f"{what}: {str(error)[:200]}"), None)
        made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        devices = [tensor.device for tensor in made]
        return Answer(None, tuple(device if device.type == "cuda" else None for device in devices))


def judge_copy(source: Memory, target: Memory, *, non_blocking: bool) -> None:
    """Note a copy between card and host that waits, and let the host wait."""
    if UNKNOWN in (source, target) or is_card(source) == is_card(target):
        return
    if not non_blocking:
        streams.host_waits("a blocking copy")
    elif is_card(source) and target != PINNED:
        streams.host_waits("a copy to pageable memory")
    elif is_card(target) and source != PINNED:
        streams.drain()
        findings.current.note(Kind.PAGEABLE, "a copy to the card")


def _label_results(
    given: list[torch.Tensor], result: Any, memories: tuple[Memory, ...] | None
) -> None:
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if labels.is_suspended() or not made:
        return
    old = {_storage(tensor) for tensor in given}
    seen = [label(tensor) for tensor in given]
    cards = [memory for memory in seen if is_card(memory)]
    for number, tensor in enumerate(made):
        if _storage(tensor) in old:
            if cards and label(tensor) == UNKNOWN:
                put(tensor, cards[0])
        elif Wanted.is_given:
            put(tensor, Wanted.memory)
        elif cards:
            of_answer = memories is not None and len(memories) == len(made)
            put(tensor, memories[number] if memories and of_answer else cards[0])
        elif not given or UNKNOWN in seen:
            put(tensor, UNKNOWN)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _judge_collective(name: str, given: list[torch.Tensor]) -> None:
    for tensor in () if name == "c10d::barrier" else given:
        what = None
        if not is_card(label(tensor)):
            what = f"{name} of host memory"
        elif tensor.dtype not in _NCCL_DTYPES:
            what = f"{name} of {tensor.dtype}"
        elif not tensor.is_contiguous():
            what = f"{name} of a tensor that is not contiguous"
        if what is not None:
            findings.current.note(Kind.COLLECTIVE, what)


@functools.cache
def _has_kernel(func: Any) -> bool:
    """Return whether this torch has a kernel for CUDA; True in a build that has none at all."""
    if torch.version.cuda is None:
        return True
    has: Callable[..., bool] = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(func.name(), key) for key in _KERNEL_KEYS)


def _key(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return *leaf.shape, "by", *leaf.stride(), leaf.dtype, label(leaf)
    return type(leaf), leaf


def _fake(leaf: Any, memory: Memory, by_python: bool) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "cpu":
        # C++ passes on the device of some tensor, which on a card is the card's.
        return leaf if by_python else labels.card()
    if not isinstance(leaf, torch.Tensor):
        return leaf
    device = labels.card() if memory == UNKNOWN else memory if is_card(memory) else _CPU
    return _empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
