"""Replacement of Transformer Engine's fp8 in experts on the CPU, at home and in replicas.

Operands are quantised by the definitions in `fp8.py`, given back in float32, and multiplied there.
Megatron's own linear layers of experts do that in place of Transformer Engine's, with FSEP and
without; replicas do it from payloads. Other layers compute as without fp8.

Legend: C slots, T tokens received, R rows of a matrix (output features), K columns. P rows of a
payload, n tokens of one slot or expert.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from megatron_laer.layer.experts.fp8.padding import padded, padded_sizes, unpadded
from megatron_laer.layer.experts.fp8.payload import PayloadForm, PayloadPacker
from megatron_laer.precision import Precision, recipe_of
from tests.doubles import fp8
from tests.doubles.fp8_parameters import Fp8Parameter, fp8_parameters, keep_in_fp8

_is_off = ContextVar("_is_off", default=False)
_SAVE_INPUT = "set_save_original_input"
# Rows and columns of a matrix that share a scale; None for one scale of all.
Block = tuple[int, int] | None


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

    weight: Block
    backward_weight: Block
    by_rows: Block
    by_columns: Block
    multiple: int
    forward: torch.dtype
    backward: torch.dtype

    @classmethod
    def of(cls, config: Any) -> Recipe:
        backward = fp8.E5M2 if config.fp8 == "hybrid" else fp8.E4M3
        return cls(*_DEFINITIONS[recipe_of(config)], fp8.E4M3, backward)

    def quantised(self, matrix_RK: torch.Tensor, dtype: torch.dtype, block: Block) -> fp8.Quantised:
        if block is None:
            return fp8.per_tensor(matrix_RK, dtype)
        if fp8.MX_BLOCK in block:
            return fp8.mx(matrix_RK, dtype, by_columns=block == _MX_COLUMNS)
        return fp8.by_blocks(matrix_RK, dtype, block)

    def again(self, matrix_RK: torch.Tensor, dtype: torch.dtype, block: Block) -> torch.Tensor:
        """Return float32 values after the matrix was quantised."""
        return fp8.dequantised(self.quantised(matrix_RK, dtype, block), block)

    def weight_in_fp8(self, weight_RK: torch.Tensor, *, in_backward: bool = False) -> fp8.Quantised:
        if isinstance(weight_RK, Fp8Parameter):
            return weight_RK.in_fp8(in_backward=in_backward)
        block = self.backward_weight if in_backward else self.weight
        return self.quantised(weight_RK, self.forward, block)

    def weight_again(self, weight_RK: torch.Tensor, *, in_backward: bool = False) -> torch.Tensor:
        block = self.backward_weight if in_backward else self.weight
        return fp8.dequantised(self.weight_in_fp8(weight_RK, in_backward=in_backward), block)

    def product(self, input_nK: torch.Tensor, weight_RK: torch.Tensor) -> torch.Tensor:
        """Return `[n, R]` in the tokens' dtype; `weight_RK` was quantised and given back."""
        input_again_nK = self.again(input_nK, self.forward, self.by_rows)
        return (input_again_nK @ weight_RK.t()).to(input_nK.dtype)

    def input_grad(self, grad_nR: torch.Tensor, weight_RK: torch.Tensor) -> torch.Tensor:
        return (self.again(grad_nR, self.backward, self.by_rows) @ weight_RK).to(grad_nR.dtype)

    def kept(self, input_nK: torch.Tensor) -> torch.Tensor:
        """Return the values of which weights' gradients are made, in memory of their own."""
        return self.again(input_nK, self.forward, self.by_columns)

    def weight_grad(self, grad_nR: torch.Tensor, kept_nK: torch.Tensor) -> torch.Tensor:
        grad_again_nR = self.again(grad_nR, self.backward, self.by_columns)
        return (grad_again_nR.t() @ kept_nK).to(grad_nR.dtype)


_SQUARE, _MX_ROWS, _MX_COLUMNS = (128, 128), (1, fp8.MX_BLOCK), (fp8.MX_BLOCK, 1)
_DEFINITIONS: dict[str, tuple[Block, Block, Block, Block, int]] = {
    "tensorwise": (None, None, None, None, 16),
    "blockwise": (_SQUARE, _SQUARE, (1, 128), (128, 1), 16),
    "mxfp8": (_MX_ROWS, _MX_COLUMNS, _MX_ROWS, _MX_COLUMNS, fp8.MX_BLOCK),
}


class EmulatedGemm:
    """`QuantisedGemm` of one linear layer."""

    def __init__(self, config: Any, rows: int, columns: int) -> None:
        recipe = self._recipe = Recipe.of(config)
        name = Precision(recipe_of(config))
        forward = PayloadPacker(PayloadForm(name, rows, columns), recipe.weight_in_fp8)
        self.packers = forward, forward
        if recipe.backward_weight != recipe.weight:
            form = PayloadForm(name, rows, columns, by_columns=True)
            quantise = partial(recipe.weight_in_fp8, in_backward=True)
            self.packers = forward, PayloadPacker(form, quantise)

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        weights = self._weights(weight_CRK, self.packers[0].form, self._recipe.weight)
        parts = zip(self._parts(input_TK, tokens_C), weights, strict=True)
        outputs = [self._recipe.product(part_nK, weight_RK) for part_nK, weight_RK in parts]
        return unpadded(torch.cat(outputs), tokens_C, self._recipe.multiple)

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        block = self._recipe.backward_weight
        weights = self._weights(weight_CRK, self.packers[1].form, block)
        parts = zip(self._parts(grad_TR, tokens_C), weights, strict=True)
        grads = [self._recipe.input_grad(grad_nR, weight_RK) for grad_nR, weight_RK in parts]
        return unpadded(torch.cat(grads), tokens_C, self._recipe.multiple)

    def kept(self, input_TK: torch.Tensor, tokens_C: Sequence[int]) -> list[torch.Tensor]:
        return [*map(self._recipe.kept, self._parts(input_TK, tokens_C))]

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        kept_TK: list[torch.Tensor],
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        parts = zip(self._parts(grad_TR, tokens_C), kept_TK, out_CRK, strict=True)
        for grad_nR, kept_nK, out_RK in parts:
            out_RK.copy_(self._recipe.weight_grad(grad_nR, kept_nK))

    def _parts(self, tokens_TK: torch.Tensor, tokens_C: Sequence[int]) -> tuple[torch.Tensor, ...]:
        padded_UK = padded(tokens_TK, tokens_C, self._recipe.multiple)
        sizes = padded_sizes(tokens_C, self._recipe.multiple)
        parts: tuple[torch.Tensor, ...] = padded_UK.split(sizes)
        return parts

    def _weights(
        self, payload_CPK: torch.Tensor, form: PayloadForm, block: Block
    ) -> list[torch.Tensor]:
        return [
            fp8.dequantised(fp8.Quantised(values_RK.view(self._recipe.forward), scales), block)
            for values_RK, scales in map(form.unpack, payload_CPK.unbind())
        ]


class Fp8Linear(torch.autograd.Function):
    """Linear layer of one expert at home, in place of Transformer Engine's."""

    @staticmethod
    def forward(
        ctx: Any, input_nK: torch.Tensor, weight_RK: torch.Tensor, recipe: Recipe
    ) -> torch.Tensor:
        ctx.save_for_backward(recipe.kept(input_nK), weight_RK)
        ctx.recipe = recipe
        return recipe.product(input_nK, recipe.weight_again(weight_RK))

    @staticmethod
    def backward(ctx: Any, grad_nR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept_nK, weight_RK = ctx.saved_tensors
        recipe, grad_input_nK, grad_weight_RK = ctx.recipe, None, None
        if ctx.needs_input_grad[0]:
            again_RK = recipe.weight_again(weight_RK, in_backward=True)
            grad_input_nK = recipe.input_grad(grad_nR, again_RK)
        if ctx.needs_input_grad[1]:
            grad_weight_RK = recipe.weight_grad(grad_nR, kept_nK)
        return grad_input_nK, grad_weight_RK, None


@contextlib.contextmanager
def fp8_replaced() -> Iterator[None]:
    """Compute experts in fp8 without Transformer Engine in this context, in FSEP and in stock."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.models.gpt import gpt_model  # imports all that recomputes
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import transformer_config

    from megatron_laer.layer.experts import fp8 as of_experts

    stock = {layer: layer._forward_impl for layer in (ColumnParallelLinear, RowParallelLinear)}
    build = {layer: layer.__init__ for layer in stock}

    def replaced(layer: type) -> Any:
        def forward(self: Any, input: torch.Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
            if not (self.is_expert and self.config.fp8) or _is_off.get():
                return stock[layer](self, input, weight, *args, **kwargs)
            assert input.dim() == 2 and kwargs.get("bias") is None  # Megatron's MLP adds it
            return Fp8Linear.apply(input, weight, Recipe.of(self.config))

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

    def emulated(config: Any, rows: int, columns: int, device: torch.device) -> EmulatedGemm:
        return EmulatedGemm(config, rows, columns)

    assert gpt_model
    with contextlib.ExitStack() as replacements:
        replacements.enter_context(fp8_parameters())
        for layer in stock:
            replacements.enter_context(mock.patch.object(layer, "__init__", built(layer)))
            replacements.enter_context(mock.patch.object(layer, "_forward_impl", replaced(layer)))
        for owner, name, replacement in (
            # Megatron asks for a release of Transformer Engine before it takes fp8.
            (transformer_config, "is_te_min_version", lambda *_, **__: True),
            (of_experts, "quantised_gemm", emulated),
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
