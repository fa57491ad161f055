"""Back end `te`: Transformer Engine's grouped GEMM over all slots, on four cuBLAS streams.

It can write weight gradients in float32, as Megatron's fused accumulation does.
`general_grouped_gemm` is not public, so it is used only with known parameters: those of Transformer
Engine 2.11 to 2.20.

Legend: C slots, T tokens received, R output features (rows), K input features (columns).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.runtime.comm.memory import poison

_PACKAGE = "transformer_engine"
_MODULE = f"{_PACKAGE}.pytorch.cpp_extensions"
_FUNCTION = "general_grouped_gemm"
_PARAMETERS = (
    *("A", "B", "out", "quantization_params", "out_dtype", "layout", "m_splits", "gelu", "grad"),
    *("accumulate", "bias", "use_bias", "use_split_accumulator", "D_dtype", "single_output"),
)
KNOWN = "2.11 to 2.20"


class _TransformerEngine(SlotGemm):
    """`SlotGemm` by a column-major function, so that weights precede tokens."""

    def problem(
        self, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
    ) -> str | None:
        way_out = "give --fsep-set gemm=loop"
        if importlib.util.find_spec(_PACKAGE) is None:
            return (
                f"Transformer Engine is not installed (there is no package {_PACKAGE}); "
                f"install transformer-engine {KNOWN}, or {way_out}"
            )
        if device.type != "cuda":
            return f"Transformer Engine needs a GPU, and this rank computes on {device}; {way_out}"
        if dtype == torch.float32:
            return f"it rounds float32 to TF32; give --bf16, or {way_out}"
        try:
            function = grouped_gemm()
        except (ImportError, OSError, AttributeError) as error:
            return f"{_MODULE}.{_FUNCTION} cannot be imported ({error}); {way_out}"
        found = tuple(inspect.signature(function).parameters)
        if found != _PARAMETERS:
            version = getattr(importlib.import_module(_PACKAGE), "__version__", "of no version")
            return (
                f"{_FUNCTION} of Transformer Engine {version} takes ({', '.join(found)}), which is "
                f"not known here; install transformer-engine {KNOWN}, or {way_out}"
            )
        return None

    def forward(
        self, input_TK: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        output_TR = poison(input_TK.new_empty(input_TK.shape[0], weight_CRK.shape[1]))
        _multiply("TN", weight_CRK.unbind(), _rows(input_TK, tokens_C), [output_TR], tokens_C)
        return output_TR

    def input_grad(
        self, grad_TR: torch.Tensor, weight_CRK: torch.Tensor, tokens_C: Sequence[int]
    ) -> torch.Tensor:
        grad_TK = poison(grad_TR.new_empty(grad_TR.shape[0], weight_CRK.shape[2]))
        _multiply("NN", weight_CRK.unbind(), _rows(grad_TR, tokens_C), [grad_TK], tokens_C)
        return grad_TK

    def weight_grad(
        self,
        grad_TR: torch.Tensor,
        kept_TK: torch.Tensor,
        tokens_C: Sequence[int],
        out_CRK: torch.Tensor,
    ) -> None:
        grads, inputs = _rows(grad_TR, tokens_C), _rows(kept_TK, tokens_C)
        _multiply("NT", inputs, grads, list(out_CRK.unbind()), tokens_C)


def _multiply(
    layout: str,
    firsts: Sequence[torch.Tensor],
    seconds: Sequence[torch.Tensor],
    outs: list[torch.Tensor],
    tokens_C: Sequence[int],
) -> None:
    """Call the grouped GEMM, with one output for products of tokens, one per slot for gradients."""
    is_weight_grad = layout == "NT"
    grouped_gemm()(
        list(firsts),
        list(seconds),
        outs,
        [None] * len(firsts),
        outs[0].dtype,
        layout=layout,
        m_splits=list(tokens_C),
        grad=layout != "TN",
        single_output=not is_weight_grad,
    )


def _rows(tokens_TX: torch.Tensor, tokens_C: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Return each slot's rows, contiguous, since Transformer Engine ignores strides."""
    rows: tuple[torch.Tensor, ...] = tokens_TX.contiguous().split(list(tokens_C))
    return rows


@functools.cache
def grouped_gemm() -> Any:
    """Import the function late: it loads CUDA libraries that are not needed elsewhere."""
    return getattr(importlib.import_module(_MODULE), _FUNCTION)


GEMM: SlotGemm = _TransformerEngine()
