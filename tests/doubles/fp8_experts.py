"""Replacement of Transformer Engine's fp8 in experts on the CPU, in stock and at home.

Operands are quantised by the definitions in `fp8.py`, given back in float32, and multiplied there.
Megatron's own linear layers of experts do that in place of Transformer Engine's, with FSEP and
without. Other layers compute as without fp8. Replicas compute by FSEP's own calls of Transformer
Engine, on the replacements of `tests/te_fp8.py`.

Legend: R rows of a matrix (output features), K columns, n tokens of one expert.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from megatron_laer.precision import recipe_of
from tests.doubles import fp8
from tests.doubles.fp8_parameters import Fp8Parameter, fp8_parameters, keep_in_fp8
from tests.doubles.fusions import mark_added

_is_off = ContextVar("_is_off", default=False)
_SAVE_INPUT = "set_save_original_input"


class Recipe(NamedTuple):
    """Definition of a recipe: how operands are quantised.

    Attributes:
        weight: block of a weight's scales; None for one scale of the whole matrix.
        backward_weight: block of those in backward.
        by_rows: block of tokens and gradients that are multiplied along their rows.
        by_columns: block of those that are multiplied along their columns, for weights' gradients.
        multiple: of rows and columns of operands.
        forward: float8 type of weights and tokens.
        backward: float8 type of gradients.
    """

    weight: fp8.Block
    backward_weight: fp8.Block
    by_rows: fp8.Block
    by_columns: fp8.Block
    multiple: int
    forward: torch.dtype
    backward: torch.dtype

    @classmethod
    def of(cls, config: Any) -> Recipe:
        backward = fp8.E5M2 if config.fp8 == "hybrid" else fp8.E4M3
        return cls(*_DEFINITIONS[recipe_of(config)], fp8.E4M3, backward)

    def again(self, matrix_RK: torch.Tensor, dtype: torch.dtype, block: fp8.Block) -> torch.Tensor:
        """Return float32 values after the matrix was quantised."""
        return fp8.dequantised(fp8.quantised(matrix_RK, dtype, block), block)

    def weight_in_fp8(self, weight_RK: torch.Tensor, *, in_backward: bool = False) -> fp8.Quantised:
        if isinstance(weight_RK, Fp8Parameter):
            return weight_RK.in_fp8(in_backward=in_backward)
        block = self.backward_weight if in_backward else self.weight
        return fp8.quantised(weight_RK, self.forward, block)

    def weight_again(self, weight_RK: torch.Tensor, *, in_backward: bool = False) -> torch.Tensor:
        block = self.backward_weight if in_backward else self.weight
        return fp8.dequantised(self.weight_in_fp8(weight_RK, in_backward=in_backward), block)


_SQUARE, _MX = (128, 128), (fp8.MX_ROWS, fp8.MX_COLUMNS)
_DEFINITIONS: dict[str, tuple[fp8.Block, fp8.Block, fp8.Block, fp8.Block, int]] = {
    "tensorwise": (None, None, None, None, 16),
    "blockwise": (_SQUARE, _SQUARE, (1, 128), (128, 1), 16),
    "mxfp8": (*_MX, *_MX, fp8.MX_BLOCK),
}


class Fp8Linear(torch.autograd.Function):
    """Linear layer of one expert at home, in place of Transformer Engine's."""

    @staticmethod
    def forward(
        ctx: Any,
        input_nK: torch.Tensor,
        weight_RK: torch.Tensor,
        recipe: Recipe,
        fuses: bool = False,
    ) -> torch.Tensor:
        ctx.fused = weight_RK if fuses else None
        ctx.save_for_backward(recipe.again(input_nK, recipe.forward, recipe.by_columns), weight_RK)
        ctx.recipe = recipe
        input_again_nK = recipe.again(input_nK, recipe.forward, recipe.by_rows)
        return (input_again_nK @ recipe.weight_again(weight_RK).t()).to(input_nK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_nR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept_nK, weight_RK = ctx.saved_tensors
        recipe, grad_input_nK, grad_weight_RK = ctx.recipe, None, None
        if ctx.needs_input_grad[0]:
            again_RK = recipe.weight_again(weight_RK, in_backward=True)
            grad_again_nR = recipe.again(grad_nR, recipe.backward, recipe.by_rows)
            grad_input_nK = (grad_again_nR @ again_RK).to(grad_nR.dtype)
        if ctx.needs_input_grad[1]:
            grad_again_nR = recipe.again(grad_nR, recipe.backward, recipe.by_columns)
            grad_weight_RK = (grad_again_nR.t() @ kept_nK).to(grad_nR.dtype)
            if ctx.fused is not None:
                ctx.fused.main_grad.add_(grad_weight_RK)
                grad_weight_RK = mark_added(ctx.fused, grad_weight_RK)
        return grad_input_nK, grad_weight_RK, None, None


@contextlib.contextmanager
def fp8_replaced() -> Iterator[None]:
    """Compute stock's experts in fp8 without Transformer Engine in this context."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.models.gpt import gpt_model  # imports all that recomputes
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import transformer_config

    stock = {layer: layer._forward_impl for layer in (ColumnParallelLinear, RowParallelLinear)}
    build = {layer: layer.__init__ for layer in stock}

    def replaced(layer: type) -> Any:
        def forward(self: Any, input: torch.Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
            if not (self.is_expert and self.config.fp8) or _is_off.get():
                return stock[layer](self, input, weight, *args, **kwargs)
            assert input.dim() == 2 and kwargs.get("bias") is None  # Megatron's MLP adds it
            fuses = kwargs["gradient_accumulation_fusion"]
            return Fp8Linear.apply(input, weight, Recipe.of(self.config), fuses)

        return forward

    def built(layer: type) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            build[layer](self, *args, **kwargs)
            if self.is_expert and self.config.fp8_param and not _is_off.get():
                keep_in_fp8(self, Recipe.of(self.config))

        return init

    def context(config: Any, layer: int = -1, is_init: bool = False) -> Any:
        if is_first_last_bf16_layer(config, layer):
            return _off()
        return contextlib.nullcontext()

    assert gpt_model
    with contextlib.ExitStack() as replacements:
        replacements.enter_context(fp8_parameters())
        for layer in stock:
            replacements.enter_context(mock.patch.object(layer, "__init__", built(layer)))
            replacements.enter_context(mock.patch.object(layer, "_forward_impl", replaced(layer)))
        for owner, name, replacement in (
            # Megatron asks for a release of Transformer Engine before it takes fp8.
            (transformer_config, "is_te_min_version", lambda *_, **__: True),
            *((owner, "get_fp8_context", context) for owner in _with("get_fp8_context")),
            *((owner, "te_checkpoint", _checkpoint) for owner in _with("te_checkpoint")),
            # Of layers after a norm that is recomputed, which are not in fp8 here.
            *((owner, _SAVE_INPUT, lambda _: None) for owner in _with(_SAVE_INPUT)),
        ):
            replacements.enter_context(mock.patch.object(owner, name, replacement))
        yield


@contextlib.contextmanager
def _off() -> Iterator[None]:
    """Compute in the parameters' dtype in this context, as layers outside fp8's contexts do."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


def _with(name: str) -> list[Any]:
    """Return the modules of Megatron that have imported this name."""
    return [
        module
        for of_module, module in list(sys.modules.items())
        if of_module.startswith("megatron.core") and name in vars(module)
    ]


def _checkpoint(
    forward: Any, is_distributed: bool, _tracker: Any, _group: Any, *args: Any, **kwargs: Any
) -> Any:
    """Replace Transformer Engine's checkpoint, which also keeps the state of fp8, by Megatron's."""
    from megatron.core.tensor_parallel import checkpoint

    return checkpoint(partial(forward, **kwargs), is_distributed, *args)
