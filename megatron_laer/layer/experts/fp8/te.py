"""Products in fp8 by Transformer Engine: its quantisers, tensors and grouped GEMM.

By recipe: one scale for each matrix and each slot's tokens (`PerTensor`), or one for each block of
them (`ByBlocks`, and `Mx` of `te_mx.py`). What is not public is used only with the parameters read
in the known releases, as for `experts/gemm/te.py`.

Legend: C slots, T tokens received, U tokens with padding, n those of one slot. R rows of a matrix
(output features), K columns, P rows of a payload.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from megatron_laer.layer.experts.fp8 import MULTIPLE
from megatron_laer.layer.experts.fp8.padding import padded, padded_sizes, unpadded
from megatron_laer.layer.experts.fp8.payload import PayloadForm, block_form, per_tensor_form
from megatron_laer.layer.experts.gemm import te as grouped
from megatron_laer.runtime.weights.layer import Carried, Packer

TENSORS = "transformer_engine.pytorch.tensor"
# Settings of recipes that replicas do not follow, with the variable that turns them on.
_NOT_OF_REPLICAS = {
    "backward_override": ("NVTE_BACKWARD_OVERRIDE", "compute backward in fp8"),
    "enable_2d_quantization": (
        "NVTE_MXFP8_ENABLE_2D_QUANTIZATION or --mxfp8-2d-quantization",
        "have scales of rows and of columns",
    ),
}
# Parameters of constructors that are given by name, by module and class.
Needs = dict[tuple[str, str], set[str]]


def problem(device: torch.device, needs: Needs, known: str = grouped.KNOWN) -> str | None:
    """Return why fp8 cannot be computed here, with a remedy; None if it can."""
    found = grouped.GEMM.problem(device, torch.bfloat16)
    if found is not None:
        return f"{found.split('; ')[0]}; leave out --fp8-format"
    for (module, name), needed in needs.items():
        try:
            part = getattr(importlib.import_module(module), name)
        except (ImportError, OSError, AttributeError) as error:
            return f"{module}.{name} cannot be imported ({error}); leave out --fp8-format"
        call = part.__init__ if name.endswith("Quantizer") else part.__new__
        if missing := needed - set(inspect.signature(call).parameters):
            return (
                f"{name} of Transformer Engine has no {', '.join(sorted(missing))}; install "
                f"transformer-engine {known}, or leave out --fp8-format"
            )
    return None


class Quantised(ABC):
    """`QuantisedGemm` of one linear layer by a recipe of Transformer Engine.

    Operands are quantised along their rows or along their columns, as each product needs.

    Attributes:
        known: releases of Transformer Engine whose parameters `needs` has.
        multiple: of rows and columns of operands, as Transformer Engine needs it.
        rows_for_columns: whether tokens along columns are made from those along rows.
    """

    needs: ClassVar[Needs]
    known: ClassVar[str] = grouped.KNOWN
    multiple: ClassVar[int] = MULTIPLE
    rows_for_columns: ClassVar[bool] = False

    def __init__(self, config: Any, form: PayloadForm) -> None:
        from megatron.core.fp8_utils import get_fp8_recipe

        self._form = form
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

    @abstractmethod
    def _quantise_weight(self, weight_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values' bytes and the scales; a parameter in fp8 has its own."""

    @abstractmethod
    def _weight(self, values_RK: torch.Tensor, scales: torch.Tensor) -> Any:
        """Return a tensor of Transformer Engine in the memory of values and scales."""

    @abstractmethod
    def _tokens_quantiser(self, kind: Any, parameters: Any, device: torch.device) -> Any: ...

    @property
    def for_backward(self) -> Packer:
        return self

    @property
    def carried(self) -> Carried:
        return self._form.carried

    def problem(
        self, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
    ) -> str | None:
        return problem(device, self.needs, self.known)

    def pack(self, weight_RK: torch.Tensor) -> torch.Tensor:
        return self._form.pack(*self._quantise_weight(weight_RK))

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        inputs = self._inputs(input_TK, tokens_C)
        return self._products("TN", self._weights(weight_CRK), inputs, tokens_C)

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        weights, grads = self._backward_weights(weight_CRK), self._grads(grad_TR, tokens_C)
        return self._products("NN", weights, grads, tokens_C)

    def kept(self, input_TK: torch.Tensor, tokens_C: Sequence[int]) -> list[Any]:
        return self._inputs(input_TK, tokens_C, by_columns=True)

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
            self._grads(grad_TR, tokens_C, by_columns=True),
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
        sizes = padded_sizes(tokens_C, self.multiple)
        is_forward = layout == "TN"
        features = self._form.rows if is_forward else self._form.columns
        product = "fprop" if is_forward else "dgrad"
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
                m_splits=self._filled_sizes(tokens_C),
                grad=not is_forward,
                use_split_accumulator=self._splits_accumulator(product),
                single_output=True,
            )
        return unpadded(output_UX, tokens_C, self.multiple)

    def _weights(self, payload_CPK: torch.Tensor) -> list[Any]:
        """Return the slots' matrices as tensors of Transformer Engine, in the payloads' memory."""
        return [self._weight(*self._form.unpack(payload_PK)) for payload_PK in payload_CPK.unbind()]

    def _backward_weights(self, payload_CPK: torch.Tensor) -> list[Any]:
        """Return the slots' matrices for products along their columns."""
        weights = self._weights(payload_CPK)
        for weight in weights:
            weight.update_usage(columnwise_usage=True)
        return weights

    def _inputs(
        self, input_TK: torch.Tensor, tokens_C: Sequence[int], *, by_columns: bool = False
    ) -> list[Any]:
        parameters = getattr(self._recipe, "fp8_quant_fwd_inp", None)
        quantise = self._tokens_quantiser(self._forward_kind, parameters, input_TK.device)
        return self._quantised(quantise, input_TK, tokens_C, by_columns)

    def _grads(
        self, grad_TR: torch.Tensor, tokens_C: Sequence[int], *, by_columns: bool = False
    ) -> list[Any]:
        parameters = getattr(self._recipe, "fp8_quant_bwd_grad", None)
        quantise = self._tokens_quantiser(self._backward_kind, parameters, grad_TR.device)
        return self._quantised(quantise, grad_TR, tokens_C, by_columns)

    def _quantised(
        self, quantise: Any, tokens_TK: torch.Tensor, tokens_C: Sequence[int], by_columns: bool
    ) -> list[Any]:
        """Quantise the tokens of each slot that has any, with rows of zeros up to the multiple."""
        quantise.set_usage(rowwise=not by_columns or self.rows_for_columns, columnwise=by_columns)
        padded_UK = padded(tokens_TK, tokens_C, self.multiple)
        parts = padded_UK.split(padded_sizes(tokens_C, self.multiple))
        return [quantise(part_nK) for part_nK in parts if len(part_nK)]

    def _filled_sizes(self, tokens_C: Sequence[int]) -> list[int]:
        return [size for size in padded_sizes(tokens_C, self.multiple) if size]

    def _splits_accumulator(self, product: str) -> bool:
        """Return the recipe's setting, or that of Transformer Engine's modules without one."""
        found = getattr(self._recipe, f"fp8_gemm_{product}", None)
        return product != "fprop" if found is None else bool(found.use_split_accumulator)


class PerTensor(Quantised):
    """Per-tensor current scaling."""

    rows_for_columns: ClassVar[bool] = True
    _module = f"{TENSORS}.float8_tensor"
    needs: ClassVar[Needs] = {
        (_module, "Float8CurrentScalingQuantizer"): {"fp8_dtype", "device", "rowwise", "columnwise"}
        | {"force_pow_2_scales", "amax_epsilon"},
        (f"{TENSORS}.storage.float8_tensor_storage", "Float8TensorStorage"): {"data", "fp8_dtype"}
        | {"fp8_scale_inv", "data_transpose", "quantizer"},
    }

    def __init__(self, config: Any, rows: int, columns: int) -> None:
        super().__init__(config, per_tensor_form(rows, columns))
        self._tensors = importlib.import_module(self._module)

    def _quantise_weight(self, weight_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantised: Any = weight_RK
        if not isinstance(weight_RK, self._tensors.Float8Tensor):
            parameters = self._recipe.fp8_quant_fwd_weight
            quantise = self._tokens_quantiser(self._forward_kind, parameters, weight_RK.device)
            # A replica transposes where its card needs it.
            quantise.set_usage(rowwise=True, columnwise=False)
            quantised = quantise(weight_RK)
        return quantised._data, quantised._scale_inv

    def _weight(self, values_RK: torch.Tensor, scales: torch.Tensor) -> Any:
        return self._tensors.Float8Tensor(
            shape=values_RK.shape,
            dtype=self._dtype,
            data=values_RK,
            fp8_scale_inv=scales,
            fp8_dtype=self._forward_kind,
        )

    def _tokens_quantiser(self, kind: Any, parameters: Any, device: torch.device) -> Any:
        return self._tensors.Float8CurrentScalingQuantizer(
            fp8_dtype=kind,
            device=device,
            rowwise=True,
            columnwise=True,
            force_pow_2_scales=parameters.power_2_scale,
            amax_epsilon=parameters.amax_epsilon,
        )


class ByBlocks(Quantised):
    """A scale for each square block of a weight, and for each 128 of a token's values.

    A square block is one in both directions, so the same payload serves forward and backward.
    """

    _module = f"{TENSORS}.float8_blockwise_tensor"
    needs: ClassVar[Needs] = {
        (_module, "Float8BlockQuantizer"): {"fp8_dtype", "rowwise", "columnwise", "amax_epsilon"}
        | {"force_pow_2_scales", "block_scaling_dim"},
        (_module, "Float8BlockwiseQTensor"): {"rowwise_data", "rowwise_scale_inv", "fp8_dtype"}
        | {"columnwise_data", "columnwise_scale_inv", "quantizer", "is_2D_scaled"},
    }

    def __init__(self, config: Any, rows: int, columns: int) -> None:
        super().__init__(config, block_form(rows, columns))
        self._tensors = importlib.import_module(self._module)
        parameters = self._recipe.fp8_quant_fwd_weight
        self._weights_quantiser = self._quantiser(self._forward_kind, parameters, dimensions=2)
        self._weights_quantiser.set_usage(columnwise=False)

    def _quantise_weight(self, weight_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantised: Any = weight_RK
        if not isinstance(weight_RK, self._tensors.Float8BlockwiseQTensor):
            quantised = self._weights_quantiser(weight_RK)
        return quantised._rowwise_data, quantised._rowwise_scale_inv

    def _weight(self, values_RK: torch.Tensor, scales: torch.Tensor) -> Any:
        return self._tensors.Float8BlockwiseQTensor(
            shape=values_RK.shape,
            dtype=self._dtype,
            rowwise_data=values_RK,
            rowwise_scale_inv=scales,
            columnwise_data=None,
            columnwise_scale_inv=None,
            fp8_dtype=self._forward_kind,
            quantizer=self._weights_quantiser,
            is_2D_scaled=True,
        )

    def _tokens_quantiser(self, kind: Any, parameters: Any, device: torch.device) -> Any:
        return self._quantiser(kind, parameters, dimensions=1)

    def _quantiser(self, kind: Any, parameters: Any, *, dimensions: int) -> Any:
        return self._tensors.Float8BlockQuantizer(
            fp8_dtype=kind,
            rowwise=True,
            columnwise=True,
            amax_epsilon=parameters.amax_epsilon,
            force_pow_2_scales=parameters.power_2_scale,
            block_scaling_dim=dimensions,
        )
