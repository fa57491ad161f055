"""Replacement of Transformer Engine's fp8 parameters of experts (`--fp8-param-gather`) on the CPU.

Megatron keeps their bytes in its own buffers and gathers them. Its optimizer's cast of master
weights is replaced: Transformer Engine reduces largest values, and here shards are added up. Those
of mxfp8 have bytes for each direction, and keep their memory: Megatron gathers values for them.

Legend: R rows of a matrix, K columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.doubles import fp8

_ATEN = torch.ops.aten


class Fp8Parameter(torch.Tensor):
    """Matrix whose only values are fp8 bytes and scales; other operations get it in its dtype.

    `recipe` quantises what is copied into it (`Recipe` of `fp8_experts.py`).
    """

    _data: torch.Tensor
    scales: torch.Tensor
    recipe: Any
    by_columns: fp8.Quantised | None
    # Autograd, and then `__torch_dispatch__`, see every operation.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        bytes_RK: torch.Tensor,
        scales: torch.Tensor,
        by_columns: fp8.Quantised | None,
        recipe: Any,
        dtype: torch.dtype,
    ) -> Fp8Parameter:
        made = torch.Tensor._make_wrapper_subclass(
            cls, bytes_RK.shape, dtype=dtype, device=bytes_RK.device
        )
        made._data, made.scales, made.by_columns = bytes_RK, scales, by_columns
        made.recipe = recipe
        return made

    @staticmethod
    def of(weight_RK: torch.Tensor, recipe: Any) -> Fp8Parameter:
        values_RK, scales = fp8.quantised(weight_RK, recipe.forward, recipe.weight)
        by_columns, cls = None, Fp8Parameter
        if recipe.backward_weight != recipe.weight:
            by_columns = fp8.quantised(weight_RK, recipe.forward, recipe.backward_weight)
            cls = Mxfp8Parameter
        return cls(values_RK.view(torch.uint8), scales, by_columns, recipe, weight_RK.dtype)

    # Names of Transformer Engine, for one scale or more, by rows and by columns.
    _scale_inv = _rowwise_scale_inv = property(lambda self: self.scales)
    _rowwise_data = property(lambda self: self._data)
    _columnwise_data = property(lambda self: self.by_columns.values_RK)
    _columnwise_scale_inv = property(lambda self: self.by_columns.scales)

    def in_fp8(self, *, in_backward: bool = False) -> fp8.Quantised:
        if in_backward and self.by_columns is not None:
            return self.by_columns
        return fp8.Quantised(self._data.view(self.recipe.forward), self.scales)

    def dequantize(self) -> torch.Tensor:
        return fp8.dequantised(self.in_fp8(), self.recipe.weight).to(self.dtype)

    def set_from(self, weight_RK: torch.Tensor, start: int = 0, end: int | None = None) -> None:
        """Quantise a matrix; keep all scales, and bytes from `start` to `end` of the flat ones."""
        made = Fp8Parameter.of(weight_RK.to(self.dtype), self.recipe)
        self._data.view(-1)[start:end].copy_(made._data.view(-1)[start:end])
        self.scales.copy_(made.scales)
        if self.by_columns is not None and made.by_columns is not None:
            for kept, new in zip(self.by_columns, made.by_columns, strict=True):
                kept.copy_(new)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _ATEN.detach.default:
            (of,) = args
            return type(of)(of._data, of.scales, of.by_columns, of.recipe, of.dtype)
        if func is _ATEN.copy_.default and isinstance(args[0], cls):
            args[0].set_from(_plain(args[1]))
            return args[0]
        assert not (func._schema.is_mutable and isinstance(args[0], cls)), func
        return func(*map(_plain, args), **(kwargs or {}))


class Mxfp8Parameter(Fp8Parameter):
    """That of mxfp8, which Megatron tells from the others."""


@contextlib.contextmanager
def fp8_parameters() -> Iterator[None]:
    """Replace Transformer Engine's classes for Megatron in this context."""
    from megatron.core import fp8_utils

    with contextlib.ExitStack() as replacements:
        for name, replacement in {
            "HAVE_TE_FP8_TENSOR_CLASS": True,
            "FP8_TENSOR_CLASS": Fp8Parameter,
            "HAVE_TE_MXFP8TENSOR": True,
            "MXFP8Tensor": Mxfp8Parameter,
            "is_te_min_version": lambda *_, **__: True,
            "_modify_underlying_storage_impl": _move_bytes,
            "_quantize_param_shard_impl": _quantise_shards,
        }.items():
            # Megatron has imported some of these names from nowhere.
            patch = mock.patch.object(fp8_utils, name, replacement, create=True)
            replacements.enter_context(patch)
        yield


def keep_in_fp8(linear: torch.nn.Module, recipe: Any) -> None:
    """Replace a linear layer's weight by one in fp8, with its attributes and its first values."""
    whole: Any = linear.weight
    made: Any = torch.nn.Parameter(Fp8Parameter.of(whole.detach(), recipe), whole.requires_grad)
    vars(made).update(vars(whole))
    # Master weights begin with these, as by `preserve_high_precision_init_val`.
    first_RK = whole.detach().clone()
    made.get_high_precision_init_val = lambda: first_RK
    made.clear_high_precision_init_val = lambda: None
    linear.weight = made


def _move_bytes(parameter: Fp8Parameter, memory: torch.Tensor) -> None:
    if isinstance(parameter, Mxfp8Parameter):
        raise NotImplementedError("Transformer Engine moves no MXFP8Tensor")
    memory.detach().copy_(parameter._data)
    parameter._data = memory


@torch.no_grad()
def _quantise_shards(
    parameters: Sequence[Fp8Parameter],
    masters: Sequence[torch.Tensor | None],
    starts: Sequence[int | None],
    group: Any,
    _: None = None,
) -> None:
    """Quantise whole matrices of which each rank of `group` has a part; write this rank's alone."""
    for parameter, master, start in zip(parameters, masters, starts, strict=True):
        whole_RK = torch.zeros(parameter.shape)
        shard = slice(0, 0)
        if master is not None:
            assert start is not None
            shard = slice(start, start + master.numel())
            whole_RK.view(-1)[shard].copy_(master)
        dist.all_reduce(whole_RK, group=group)
        parameter.set_from(whole_RK, shard.start, shard.stop)


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Fp8Parameter) else value
