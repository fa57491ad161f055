"""Products in fp8 by Transformer Engine: its quantisers, tensors and grouped GEMM.

`precision.py` has each recipe's classes and their arguments. These are not public, so they are
used only with the parameters read in the known releases, as for `experts/gemm/te.py`.

In mxfp8 a matrix is other bytes along its rows, which forward multiplies, than along its columns,
for backward. So it has two payloads. Transformer Engine pads scales to tiles, and its GEMM swizzles
those of mxfp8. A parameter in fp8 has its own bytes, and scales that are not swizzled.

Legend: C slots, T tokens received, U tokens with padding, n those of one slot. R rows of a matrix
(output features), K columns, P rows of a payload.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from megatron_laer.layer.experts.fp8.padding import padded, padded_sizes, unpadded
from megatron_laer.layer.experts.fp8.payload import PayloadForm, PayloadPacker
from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.layer.experts.gemm import te as grouped
from megatron_laer.precision import Precision, Quantisation
from megatron_laer.runtime.comm.memory import empty
from megatron_laer.runtime.weights.share import Packers

TENSORS = "transformer_engine.pytorch.tensor"


class Operand(NamedTuple):
    """Operand of a product: the recipe's settings of it, and the dimensions of a block's scale."""

    settings: str
    dimensions: int
    is_of_backward: bool = False


WEIGHT = Operand("fp8_quant_fwd_weight", 2)
INPUT = Operand("fp8_quant_fwd_inp", 1)
GRAD = Operand("fp8_quant_bwd_grad", 1, is_of_backward=True)
# Settings of recipes that replicas do not follow, with the variable that turns them on.
_NOT_OF_REPLICAS = {
    "backward_override": ("NVTE_BACKWARD_OVERRIDE", "compute backward in fp8"),
    "enable_2d_quantization": (
        "NVTE_MXFP8_ENABLE_2D_QUANTIZATION or --mxfp8-2d-quantization",
        "have scales of rows and of columns",
    ),
}


def problem(device: torch.device, row: Quantisation) -> str | None:
    """Return why fp8 cannot be computed here, with a remedy; None if it can."""
    found = grouped.GEMM.problem(device, torch.bfloat16)
    if found is not None:
        return f"{found.split('; ')[0]}; leave out --fp8-format"
    quantiser, tensor = row.quantiser, row.tensor
    for module, name, needed in (
        quantiser,
        (*(row.signature or (tensor.module, tensor.name)), tensor.arguments),
    ):
        try:
            part = _part(module, name)
        except (ImportError, OSError, AttributeError) as error:
            return f"{TENSORS}.{module}.{name} cannot be imported ({error}); leave out --fp8-format"
        call = part.__init__ if name == quantiser.name else part.__new__
        if missing := {*needed} - {*inspect.signature(call).parameters}:
            return (
                f"{name} of Transformer Engine has no {', '.join(sorted(missing))}; install "
                f"transformer-engine {row.releases}, or leave out --fp8-format"
            )
    return None


def _part(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{TENSORS}.{module}"), name)


class Quantised(SlotGemm):
    """`QuantisedGemm` of one linear layer by a recipe of Transformer Engine.

    Operands are quantised along their rows or along their columns, as each product needs.
    """

    def __init__(self, config: Any, precision: Precision, rows: int, columns: int) -> None:
        from megatron.core.fp8_utils import get_fp8_recipe

        self._row = precision.row
        self._forms = [PayloadForm(precision, rows, columns, way) for way in (False, True)]
        self._dtype = config.params_dtype
        self._recipe = get_fp8_recipe(config)
        for name, (setting, reason) in _NOT_OF_REPLICAS.items():
            if given := getattr(self._recipe, name, None):
                raise ValueError(
                    f"{setting}: the recipe of Transformer Engine has {name}={given}, and with "
                    f"experts in fp8 replicas {reason}, unlike their homes; unset it"
                )
        kinds = importlib.import_module("transformer_engine_torch").DType
        self._forward_kind = kinds.kFloat8E4M3
        self._backward_kind = kinds.kFloat8E5M2 if config.fp8 == "hybrid" else kinds.kFloat8E4M3
        self._tensor = _part(self._row.tensor.module, self._row.tensor.name)

    @cached_property
    def packers(self) -> Packers:
        forward, backward = (
            PayloadPacker(form, partial(self._quantise_weight, by_columns=form.by_columns))
            for form in self._forms
        )
        return forward, backward if self._row.directions > 1 else forward

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        inputs = self._quantised(INPUT, input_TK, tokens_C)
        return self._products("TN", self._weights(weight_CRK), inputs, tokens_C)

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        by_columns = self._row.directions > 1
        weights = self._weights(weight_CRK, by_columns=by_columns)
        for weight in () if by_columns else weights:
            weight.update_usage(columnwise_usage=True)
        return self._products("NN", weights, self._quantised(GRAD, grad_TR, tokens_C), tokens_C)

    def kept(self, input_TK: torch.Tensor, tokens_C: Sequence[int]) -> list[Any]:
        return self._quantised(INPUT, input_TK, tokens_C, by_columns=True)

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        kept_TK: list[Any],
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        filled = [slot for slot, tokens in enumerate(tokens_C) if tokens]
        for slot in set(range(len(tokens_C))) - set(filled):
            out_CRK[slot].zero_()
        if not filled:
            return
        grouped.grouped_gemm()(
            kept_TK,
            self._quantised(GRAD, grad_TR, tokens_C, by_columns=True),
            [out_CRK[slot] for slot in filled],
            [None] * len(filled),
            out_CRK.dtype,
            layout="NT",
            m_splits=self._filled_sizes(tokens_C),
            grad=True,
            use_split_accumulator=self._splits_accumulator("wgrad"),
        )

    def _products(
        self,
        layout: str,
        weights: list[Any],
        tokens: list[Any],
        tokens_C: Sequence[int],
    ) -> torch.Tensor:
        """Multiply slots' quantised tokens by their matrices; leave out slots without any."""
        sizes = padded_sizes(tokens_C, self._row.multiple)
        is_forward = layout == "TN"
        features = self._forms[0].rows if is_forward else self._forms[0].columns
        product = "fprop" if is_forward else "dgrad"
        device = weights[0].device
        output_UX = empty((sum(sizes), features), self._dtype, device)
        filled = [weight for weight, size in zip(weights, sizes, strict=True) if size]
        if filled:
            grouped.grouped_gemm()(
                filled,
                tokens,
                [output_UX],
                [None] * len(filled),
                output_UX.dtype,
                layout=layout,
                m_splits=self._filled_sizes(tokens_C),
                grad=not is_forward,
                use_split_accumulator=self._splits_accumulator(product),
                single_output=True,
            )
        return unpadded(output_UX, tokens_C, self._row.multiple)

    def _quantise_weight(
        self, weight_RK: torch.Tensor, *, by_columns: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values' bytes and the scales; a parameter in fp8 has its own."""
        quantised: Any = weight_RK
        if not isinstance(weight_RK, self._tensor):
            # A replica transposes where its card needs it.
            quantise = self._quantiser(WEIGHT, weight_RK.device, not by_columns, by_columns)
            quantised = quantise(weight_RK)
        values, scales = (f"_{self._stored(name, by_columns)}" for name in ("data", "scale_inv"))
        return getattr(quantised, values), getattr(quantised, scales)

    def _weights(self, payload_CPK: torch.Tensor, *, by_columns: bool = False) -> list[Any]:
        """Return the slots' matrices as tensors of Transformer Engine, in the payloads' memory."""
        quantiser = self._quantiser(WEIGHT, payload_CPK.device, not by_columns, by_columns)
        unpack = self._forms[by_columns].unpack
        return [
            self._weight(*unpack(payload_PK), quantiser, by_columns=by_columns)
            for payload_PK in payload_CPK.unbind()
        ]

    def _weight(
        self, values_RK: torch.Tensor, scales: torch.Tensor, quantiser: Any, *, by_columns: bool
    ) -> Any:
        tile = self._row.tile[::-1] if by_columns else self._row.tile
        missing = [-size % side for size, side in zip(scales.shape, tile, strict=True)]
        if any(missing):
            scales = torch.nn.functional.pad(scales, (0, missing[1], 0, missing[0]))
        given = {
            self._stored("data", by_columns): values_RK,
            self._stored("scale_inv", by_columns): scales,
            "fp8_scale_inv": scales,
            "fp8_dtype": self._forward_kind,
            "quantizer": quantiser,
            "is_2D_scaled": True,
            "with_gemm_swizzled_scales": False,
        }
        arguments = {name: given.get(name) for name in self._row.tensor.arguments}
        return self._tensor(shape=values_RK.shape, dtype=self._dtype, **arguments)

    def _stored(self, part: str, by_columns: bool) -> str:
        """Return the name of a tensor's values or scales."""
        if "data" in self._row.tensor.arguments:
            return part
        return f"{'column' if by_columns else 'row'}wise_{part}"

    def _quantiser(
        self, operand: Operand, device: torch.device, by_rows: bool, by_columns: bool
    ) -> Any:
        parameters = getattr(self._recipe, operand.settings, None)
        given = {
            "fp8_dtype": self._backward_kind if operand.is_of_backward else self._forward_kind,
            "rowwise": True,
            "columnwise": True,
            "device": device,
            "force_pow_2_scales": getattr(parameters, "power_2_scale", None),
            "amax_epsilon": getattr(parameters, "amax_epsilon", None),
            "block_scaling_dim": operand.dimensions,
        }
        module, name, arguments = self._row.quantiser
        made = _part(module, name)(**{argument: given[argument] for argument in arguments})
        made.set_usage(rowwise=by_rows, columnwise=by_columns)
        return made

    def _quantised(
        self,
        operand: Operand,
        tokens_TK: torch.Tensor,
        tokens_C: Sequence[int],
        *,
        by_columns: bool = False,
    ) -> list[Any]:
        """Quantise the tokens of each slot that has any, with rows of zeros up to the multiple."""
        by_rows = not by_columns or self._row.rows_for_columns
        quantise = self._quantiser(operand, tokens_TK.device, by_rows, by_columns)
        padded_UK = padded(tokens_TK, tokens_C, self._row.multiple)
        parts = padded_UK.split(padded_sizes(tokens_C, self._row.multiple))
        return [quantise(part_nK) for part_nK in parts if len(part_nK)]

    def _filled_sizes(self, tokens_C: Sequence[int]) -> list[int]:
        return [size for size in padded_sizes(tokens_C, self._row.multiple) if size]

    def _splits_accumulator(self, product: str) -> bool:
        """Return the recipe's setting, or that of Transformer Engine's modules without one."""
        found = getattr(self._recipe, f"fp8_gemm_{product}", None)
        return product != "fprop" if found is None else bool(found.use_split_accumulator)
