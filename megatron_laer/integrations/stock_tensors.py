"""Tensors that lend whole experts, copied from slices, and notice writes.

A write reaches the slices while their layer is lent for writing. Otherwise it raises, so that none
is lost silently. Reads work until the weights change; results computed from them are plain tensors.
Code that only has an address, such as a custom kernel, is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import reductions
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass
class Loan:
    """Permission to read and write tensors.

    Attributes:
        is_old: returns whether the weights have changed since they were copied.
        is_over: whether later writes would be lost.
    """

    is_writable: bool
    is_old: Callable[[], bool] = lambda: False
    is_over: bool = False
    is_written: bool = False

    def check_read(self) -> None:
        """Raise RuntimeError if the weights changed; stock's parameters would have the new ones."""
        if self.is_old():
            raise RuntimeError(
                f"{_IS_COPY}, and these have changed since: ask for it again, or keep a clone() of "
                "it; of Megatron-Bridge's tasks, keep no list from one step to another"
            )

    def check_write(self) -> None:
        """Note a write; raise RuntimeError if it would be lost."""
        if not self.is_writable:
            raise RuntimeError(f"{_IS_COPY} and is read-only: {_WAYS_OUT}")
        if self.is_over:
            raise RuntimeError(
                f"{_IS_COPY}, which has been written back by now: write to it before the next "
                "layer's is asked for, or load all weights with "
                "megatron_laer.load_stock_named_parameters"
            )
        self.is_written = True


class LentExpert(torch.Tensor):
    """Tensor in borrowed memory, whose loan permits or refuses writes. Views of it are lent too."""

    _plain: torch.Tensor
    _loan: Loan

    # All operators reach `__torch_dispatch__`, including those of C++ and of torch.distributed.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: torch.Tensor, loan: Loan) -> LentExpert:
        lent: LentExpert = torch.Tensor._make_subclass(cls, plain)
        lent.__dict__.update(plain.__dict__)
        lent._plain, lent._loan = plain, loan
        return lent

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on the plain tensors, unless it writes to one that is not writable."""
        kwargs = kwargs or {}
        for tensor in _written_by(func, args, kwargs):
            if func in _OTHER_MEMORY:
                raise RuntimeError(f"{_IS_COPY}: its memory cannot be exchanged; use copy_")
            tensor._loan.check_write()
        lent = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        for tensor in lent:
            tensor._loan.check_read()
        args, kwargs = tree_map_only(cls, lambda tensor: tensor._plain, (args, kwargs))

        def lend(result: torch.Tensor) -> torch.Tensor:
            for tensor in lent:
                if result is tensor._plain:
                    return tensor
                if torch._C._is_alias_of(result, tensor._plain):  # type: ignore[attr-defined]
                    return LentExpert(result, tensor._loan)
            return result

        return tree_map_only(torch.Tensor, lend, func(*args, **kwargs))

    @property
    def plain(self) -> torch.Tensor:
        """Return the plain tensor, for reading only."""
        self._loan.check_read()
        return self._plain

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value.shape != self.shape:
            raise RuntimeError(
                f"{_IS_COPY}: it has the shape {list(self.shape)}, and cannot take the data of "
                f"{list(value.shape)}"
            )
        self.detach().copy_(value.detach())

    def numpy(self, **options: Any) -> Any:
        array = self.plain.numpy(**options)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.plain.tolist()

    def __copy__(self) -> torch.Tensor:
        return self.detach()

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.plain.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)


def _reduce_between_processes(tensor: LentExpert) -> Any:
    # Looked up at each call, since rollout engines replace it.
    return reductions.reduce_tensor(tensor.plain)


ForkingPickler.register(LentExpert, _reduce_between_processes)


def _written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[LentExpert]:
    if func.namespace == "c10d":  # c10d's schemas mark no writes: the first argument receives
        name = func._schema.name.partition("::")[2]
        is_root = name == "broadcast_" and dist.ProcessGroup.unbox(args[1]).rank() == args[2]
        written = [args[0]] if name.endswith("_") and not is_root else []
    else:
        parameters = func._schema.arguments
        given = {
            **dict(zip((parameter.name for parameter in parameters), args, strict=False)),
            **kwargs,
        }
        written = [
            given[parameter.name]
            for parameter in parameters
            if parameter.alias_info is not None
            and parameter.alias_info.is_write
            and parameter.name in given
        ]
    yield from (leaf for leaf in tree_leaves(written) if isinstance(leaf, LentExpert))


_OTHER_MEMORY = {
    torch.ops.aten.resize_.default,
    *(getattr(torch.ops.aten.set_, name) for name in torch.ops.aten.set_.overloads()),
}
_IS_COPY = "an expert that stock_named_parameters gave is a copy of weights that FSEP has in slices"
_WAYS_OUT = (
    "give stock_named_parameters(..., writable=True), load all weights with "
    "megatron_laer.load_stock_named_parameters, or change a clone() of it"
)
