"""Products in fp8 by Transformer Engine: its quantisers, tensors and grouped GEMM.

Per-tensor current scaling: one scale for each matrix, and for each slot's tokens. What is not
public is used only with the parameters read in the known releases, as for `experts/gemm/te.py`.

Legend: C slots, T tokens received, U tokens with padding, n those of one slot. R rows of a matrix
(output features), K columns, P rows of a payload.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from megatron_laer.layer.experts.fp8 import MULTIPLE
from megatron_laer.layer.experts.fp8.padding import padded, padded_sizes, unpadded
from megatron_laer.layer.experts.fp8.payload import per_tensor_form
from megatron_laer.layer.experts.gemm import te as grouped
from megatron_laer.runtime.weights.layer import Carried

_PACKAGE = "transformer_engine"
_TENSORS = f"{_PACKAGE}.pytorch.tensor.float8_tensor"
_QUANTISER, _TENSOR = "Float8CurrentScalingQuantizer", "Float8Tensor"
# Parameters that are given by name, which the constructors must have.
_NEEDED = {
    _QUANTISER: {"fp8_dtype", "device", "rowwise", "columnwise"}
    | {"force_pow_2_scales", "amax_epsilon"},
    f"{_TENSOR}Storage": {"data", "fp8_scale_inv", "fp8_dtype", "data_transpose", "quantizer"},
}


def problem(device: torch.device) -> str | None:
    """Return why fp8 cannot be computed here, with a remedy; None if it can."""
    found = grouped.GEMM.problem(device, torch.bfloat16)
    if found is not None:
        return f"{found.split('; ')[0]}; leave out --fp8-format"
    try:
        parts = [(name, getattr(importlib.import_module(_module(name)), name)) for name in _NEEDED]
    except (ImportError, OSError, AttributeError) as error:
        return f"Transformer Engine's tensors cannot be imported ({error}); leave out --fp8-format"
    for name, part in parts:
        call = part.__init__ if name == _QUANTISER else part.__new__
        missing = _NEEDED[name] - set(inspect.signature(call).parameters)
        if missing:
            return (
                f"{name} of Transformer Engine has no {', '.join(sorted(missing))}; install "
                f"transformer-engine {grouped.KNOWN}, or leave out --fp8-format"
            )
    return None


def _module(name: str) -> str:
    if name == _QUANTISER:
        return _TENSORS
    return f"{_PACKAGE}.pytorch.tensor.storage.float8_tensor_storage"


class PerTensor:
    """`QuantisedGemm` of one linear layer with per-tensor current scaling."""

    def __init__(self, config: Any, rows: int, columns: int) -> None:
        from megatron.core.fp8_utils import get_fp8_recipe

        self._form = per_tensor_form(rows, columns)
        self._dtype = config.params_dtype
        self._recipe = get_fp8_recipe(config)
        tensors = importlib.import_module(_TENSORS)
        self._tensor_class = getattr(tensors, _TENSOR)
        self._quantiser_class = getattr(tensors, _QUANTISER)
        kinds = importlib.import_module("transformer_engine_torch").DType
        self._forward_kind = kinds.kFloat8E4M3
        self._backward_kind = kinds.kFloat8E5M2 if config.fp8 == "hybrid" else kinds.kFloat8E4M3

    @property
    def carried(self) -> Carried:
        return Carried(self._form.payload_rows, self._form.columns, torch.uint8)

    def problem(
        self, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
    ) -> str | None:
        return problem(device)

    def pack(self, weight_RK: torch.Tensor) -> torch.Tensor:
        parameters = self._recipe.fp8_quant_fwd_weight
        quantised = self._quantiser(self._forward_kind, parameters, weight_RK.device)(weight_RK)
        return self._form.pack(quantised._data, quantised._scale_inv)

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        splits = self._recipe.fp8_gemm_fprop.use_split_accumulator
        inputs = self._inputs(input_TK, tokens_C)
        return self._products("TN", self._weights(weight_CRK), inputs, tokens_C, splits)

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        splits = self._recipe.fp8_gemm_dgrad.use_split_accumulator
        weights = self._weights(weight_CRK)
        for weight in weights:
            weight.update_usage(columnwise_usage=True)
        grads = self._grads(grad_TR, tokens_C)
        return self._products("NN", weights, grads, tokens_C, splits)

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        input_TK: torch.Tensor,
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        filled = [slot for slot, tokens in enumerate(tokens_C) if tokens]
        for slot in set(range(len(tokens_C))) - set(filled):
            out_CRK[slot].zero_()
        if not filled:
            return
        grouped.grouped_gemm()(
            self._inputs(input_TK, tokens_C),
            self._grads(grad_TR, tokens_C),
            [out_CRK[slot] for slot in filled],
            [None] * len(filled),
            out_CRK.dtype,
            layout="NT",
            m_splits=_filled_sizes(tokens_C),
            grad=True,
            use_split_accumulator=self._recipe.fp8_gemm_wgrad.use_split_accumulator,
        )

    def _products(
        self,
        layout: str,
        weights: list[Any],
        tokens: list[Any],
        tokens_C: Sequence[int],
        splits_accumulator: bool,
    ) -> torch.Tensor:
        """Multiply slots' quantised tokens by their matrices; leave out slots without any."""
        sizes = padded_sizes(tokens_C, MULTIPLE)
        features = self._form.rows if layout == "TN" else self._form.columns
        device = weights[0].device
        output_UX = torch.empty((sum(sizes), features), dtype=self._dtype, device=device)
        filled = [weight for weight, size in zip(weights, sizes, strict=True) if size]
        if filled:
            grouped.grouped_gemm()(
                filled,
                tokens,
                [output_UX],
                [None] * len(filled),
                output_UX.dtype,
                layout=layout,
                m_splits=_filled_sizes(tokens_C),
                grad=layout == "NN",
                use_split_accumulator=splits_accumulator,
                single_output=True,
            )
        return unpadded(output_UX, tokens_C, MULTIPLE)

    def _weights(self, payload_CPK: torch.Tensor) -> list[Any]:
        """Return the slots' matrices as tensors of Transformer Engine, in the payloads' memory."""
        unpacked = map(self._form.unpack, payload_CPK.unbind())
        return [
            self._tensor_class(
                shape=(self._form.rows, self._form.columns),
                dtype=self._dtype,
                data=values_RK,
                fp8_scale_inv=scale,
                fp8_dtype=self._forward_kind,
            )
            for values_RK, scale in unpacked
        ]

    def _inputs(self, input_TK: torch.Tensor, tokens_C: Sequence[int]) -> list[Any]:
        parameters = self._recipe.fp8_quant_fwd_inp
        quantise = self._quantiser(self._forward_kind, parameters, input_TK.device)
        return _quantised(quantise, input_TK, tokens_C)

    def _grads(self, grad_TR: torch.Tensor, tokens_C: Sequence[int]) -> list[Any]:
        parameters = self._recipe.fp8_quant_bwd_grad
        quantise = self._quantiser(self._backward_kind, parameters, grad_TR.device)
        return _quantised(quantise, grad_TR, tokens_C)

    def _quantiser(self, kind: Any, parameters: Any, device: torch.device) -> Any:
        return self._quantiser_class(
            fp8_dtype=kind,
            device=device,
            rowwise=True,
            columnwise=True,
            force_pow_2_scales=parameters.power_2_scale,
            amax_epsilon=parameters.amax_epsilon,
        )


def _quantised(quantise: Any, tokens_TK: torch.Tensor, tokens_C: Sequence[int]) -> list[Any]:
    """Quantise the tokens of each slot that has any, with rows of zeros up to the multiple."""
    padded_UK = padded(tokens_TK, tokens_C, MULTIPLE)
    parts = padded_UK.split(padded_sizes(tokens_C, MULTIPLE))
    return [quantise(part_nK) for part_nK in parts if len(part_nK)]


def _filled_sizes(tokens_C: Sequence[int]) -> list[int]:
    return [size for size in padded_sizes(tokens_C, MULTIPLE) if size]
