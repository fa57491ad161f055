"""Measurements of the experts' GEMMs, by back end and product.

Legend: C slots, T tokens of all slots, R rows and K columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_laer.layer.experts.gemm import SlotGemm, gemm_names, slot_gemm
from megatron_laer.tools.calibration.quantities import FORWARD, INPUT_GRAD, PRODUCTS, Product
from megatron_laer.tools.calibration.sampling import Job, Sample, timed
from megatron_laer.tools.calibration.settings import CalibrationSettings


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of weights and tokens in training on such a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def usable_back_ends(settings: CalibrationSettings, device: torch.device) -> list[str]:
    sizes = [size for matrix in settings.expert.matrices for size in matrix]
    dtype = compute_dtype(device)
    return [name for name in gemm_names() if slot_gemm(name).problem(device, dtype, sizes) is None]


def gemm_jobs(
    back_ends: Sequence[str], settings: CalibrationSettings, device: torch.device
) -> Iterator[Job]:
    """Yield a job per back end, product and number of tokens, each for whole experts."""
    for name in back_ends:
        for product in PRODUCTS:
            for tokens in settings.tokens:

                def prepare(
                    name: str = name, product: str = product, tokens: int = tokens
                ) -> Sample:
                    run = product_of(slot_gemm(name), product, tokens, settings, device)
                    return timed(run, device)

                yield Job(Product(name, product, tokens), prepare, units=settings.slots)


def product_of(
    gemm: SlotGemm, product: str, tokens: int, settings: CalibrationSettings, device: torch.device
) -> Callable[[], None]:
    """Return a function that computes one product for both matrices of every slot."""
    tokens_C = [tokens] * settings.slots
    total = sum(tokens_C)
    options: dict[str, Any] = {"device": device, "dtype": compute_dtype(device)}
    # Not zeros: a GPU's clock depends on the values.
    operands = [
        (
            torch.randn(settings.slots, rows, columns, **options),
            torch.randn(total, columns, **options),
            torch.randn(total, rows, **options),
        )
        for rows, columns in settings.expert.matrices
    ]
    out = [torch.empty_like(weight_CRK) for weight_CRK, _, _ in operands]

    def run() -> None:
        for (weight_CRK, input_TK, grad_TR), grads_CRK in zip(operands, out, strict=True):
            if product == FORWARD:
                gemm.forward(input_TK, weight_CRK, tokens_C)
            elif product == INPUT_GRAD:
                gemm.input_grad(grad_TR, weight_CRK, tokens_C)
            else:
                gemm.weight_grad(grad_TR, input_TK, tokens_C, grads_CRK)

    return run
