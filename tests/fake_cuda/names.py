"""torch's names that make, move and read tensors, replaced for tensors with labels.

Names of the CPU platform (`megatron_laer.cpu.cuda`) are undone where they lead to the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed._shard.sharded_tensor._ops  # registers replaced names
from torch.distributed._shard.sharded_tensor import ShardedTensor

from megatron_laer import device as megatrons_device
from tests.fake_cuda import findings, labels, streams
from tests.fake_cuda.labels import PINNED, Memory, card, is_card, label, on_card, put, torchs_own
from tests.fake_cuda.oracle import Wanted, judge_copy

_CPU = torch.device("cpu")
_CARD_BYTES = 80 * 2**30
_BASE: Any = torch._C.TensorBase
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn"),
    *("randn_like", "randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
# Those that take values of the host.
_OF_VALUES = ("as_tensor", "tensor", "new_tensor")


@contextlib.contextmanager
def replaced(capability: tuple[int, int]) -> Iterator[None]:
    """Replace names inside the block, for a card of this compute capability."""
    tensor: Any = torch.Tensor
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, replacement))

        patch(tensor, "device", property(_device))
        patch(tensor, "is_cuda", property(on_card))
        patch(tensor, "is_cpu", property(lambda self: not on_card(self)))
        for owner, names in ((torch, _FACTORIES), (tensor, _TENSOR_FACTORIES)):
            for name in names:
                patch(owner, name, _factory(name, torchs_own(getattr(owner, name))))
        to = _to(torchs_own(tensor.to))
        patch(tensor, "to", to)
        patch(tensor, "cpu", lambda self, **_: to(self, _CPU))
        patch(
            tensor,
            "cuda",
            lambda self, device=None, non_blocking=False, **_: to(
                self, card() if device is None else device, non_blocking=non_blocking
            ),
        )
        patch(tensor, "is_pinned", lambda self, *_: label(self) == PINNED)
        patch(tensor, "pin_memory", _pin_memory)
        patch(tensor, "tolist", _tolist(tensor.tolist))
        for name in ("numpy", "__array__"):
            patch(tensor, name, _only_of_host(name, getattr(tensor, name)))
        module: Any = torch.nn.Module
        patch(module, "cuda", lambda self, *_: self._apply(lambda part: part.cuda()))
        patch(module, "to", torchs_own(module.to))
        patch(module, "to_empty", torchs_own(module.to_empty))
        patch(torch, "Generator", _Generator)
        patch(torch.cuda, "current_device", lambda: card().index)
        patch(torch.cuda, "get_device_capability", lambda *_: capability)
        patch(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
        patch(torch.cuda, "mem_get_info", lambda *_: (_CARD_BYTES, _CARD_BYTES))
        patch(torch.cuda, "set_sync_debug_mode", _set_sync_debug_mode)
        # gloo's groups would exchange objects on the host.
        patch(torch.distributed.distributed_c10d, "_get_object_coll_device", lambda _=None: "cuda")
        patch(megatrons_device, "_installed", False)
        patch(megatrons_device, "cpu_needed", lambda *_: False)
        yield


_true_device: Any = _BASE.device


def _device(tensor: torch.Tensor) -> torch.device:
    if isinstance(tensor, ShardedTensor):  # of checkpoints; torch looks for a name that is replaced
        shards = tensor.local_shards()
        return _device(shards[0].tensor) if shards else card()
    memory = label(tensor)
    device: torch.device = memory if is_card(memory) else _true_device.__get__(tensor)
    return device


class _Generator(torch.Generator):
    """Generator on the CPU for any device."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, _CPU)


def _set_sync_debug_mode(mode: str) -> None:
    findings.current.raises = mode == "error"


def _of_card(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    # torch reads a bare integer as the index of an accelerator.
    return isinstance(device, int) and not isinstance(device, bool)


def _memory(device: Any) -> Memory:
    if not _of_card(device):
        return None
    if isinstance(device, int):
        return torch.device("cuda", device)
    device = torch.device(device)
    return card() if device.index is None else device


@contextlib.contextmanager
def _wanting(memory: Memory) -> Iterator[None]:
    before = Wanted.is_given, Wanted.memory
    Wanted.is_given, Wanted.memory = True, memory
    try:
        yield
    finally:
        Wanted.is_given, Wanted.memory = before


def _factory(name: str, true: Callable[..., Any]) -> Callable[..., Any]:
    follows_tensor = name.endswith("_like") or name.startswith("new_") or name == "as_tensor"

    @functools.wraps(true)
    def make(*args: Any, **kwargs: Any) -> Any:
        if labels.is_suspended():
            return true(*args, **kwargs)
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if device is not None and torch.device(device).type not in ("cpu", "cuda"):
            return true(*args, **kwargs)
        if device is None and follows_tensor:
            return true(*args, **kwargs)
        wanted = PINNED if pinned else _memory(device)
        source = args[0] if args else kwargs.get("data")
        if name == "as_tensor" and isinstance(source, torch.Tensor):
            dtype = kwargs.get("dtype")
            return source.to(device) if dtype is None else source.to(device, dtype)
        if device is not None:
            kwargs["device"] = _CPU
        with _wanting(wanted):
            made = true(*args, **kwargs)
        put(made, wanted)
        if name in _OF_VALUES and is_card(wanted):
            judge_copy(None, wanted, non_blocking=False)
        return made

    return make


def _to(true: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(true)
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if labels.is_suspended():
            return true(tensor, *args, **kwargs)
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, torch.Tensor):
            device, dtype = device.device, device.dtype
            args = (device, dtype, *args[1:])
        if isinstance(device, torch.dtype) or device is None:
            return true(tensor, *args, **kwargs)
        if not _of_card(device) and torch.device(device).type != "cpu":
            return true(tensor, *args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = _CPU
        else:
            args = (_CPU, *args[1:])
        here, wanted = label(tensor), _memory(device)
        if here == wanted or (not is_card(here) and not is_card(wanted)):
            return true(tensor, *args, **kwargs)
        if not is_card(wanted) and kwargs.get("non_blocking"):
            wanted = PINNED  # as torch does
        with _wanting(wanted):
            return true(tensor, *args, **{**kwargs, "copy": True})

    return to


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    if label(tensor) == PINNED:
        return tensor
    assert not on_card(tensor), "cannot pin memory of a card"
    return put(tensor.clone(), PINNED)


def _tolist(true: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(true)
    def tolist(tensor: torch.Tensor) -> Any:
        if on_card(tensor):
            streams.host_waits("Tensor.tolist")
        with labels.suspended():
            return true(tensor)

    return tolist


def _only_of_host(name: str, true: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(true)
    def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if on_card(tensor):
            findings.current.note(findings.Kind.MISMATCH, f"Tensor.{name} of the card")
            raise TypeError(
                f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() to "
                "copy the tensor to host memory first."
            )
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # Megatron makes the view while the copy runs, and waits before it reads.
        if label(tensor) == PINNED and not caller.startswith("megatron."):
            streams.read_by_host(name, tensor)
        return true(tensor, *args, **kwargs)

    return read
