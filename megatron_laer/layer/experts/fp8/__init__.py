"""Experts in fp8: quantised matrices of replicas, and the products with them.

Home slots are stock's modules of Transformer Engine. A replica receives its home's quantised matrix
and scales (`payload.py`), quantises its own tokens, and multiplies as its home would. `te.py` does
that on a GPU. Amax and scales are found at home; master weights and gradients are as without fp8.

Legend: C slots, K columns of a matrix, P rows of its payload.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.precision import Precision, card_problem, recipe_of
from megatron_laer.runtime.weights.share import Packers


class QuantisedGemm(SlotGemm, Protocol):
    """Products of one linear layer in fp8: payloads `[C, P, K]` are its slots' matrices.

    Slots' tokens and gradients are quantised as stock's expert would those of one expert.
    """

    @property
    def packers(self) -> Packers: ...


def check_card(config: Any, device: torch.device) -> None:
    """Refuse a card that computes no products of the config's recipe, before any is asked for."""
    if device.type == "cuda":
        card = torch.cuda.get_device_capability(device)
        problem = card_problem(Precision(recipe_of(config)), card, torch.version.cuda)
        if problem is not None:
            raise ValueError(problem)


def quantised_gemm(config: Any, rows: int, columns: int, device: torch.device) -> QuantisedGemm:
    """Return the products of a linear layer by the recipe of Megatron's TransformerConfig.

    Raises:
        ValueError: a Transformer Engine without such products; sizes that do not fit.
    """
    from megatron_laer.layer.experts.fp8 import te

    precision = Precision(recipe_of(config))
    row = precision.row
    if rows % row.multiple or columns % row.multiple:
        raise ValueError(
            f"--fsep-allow-unproven fp8-experts: a matrix of the experts has {rows} x {columns} "
            f"elements, and --fp8-recipe {precision} needs multiples of {row.multiple}; take "
            "other sizes, or leave out --fp8-format"
        )
    if (problem := te.problem(device, row)) is not None:
        raise ValueError(f"--fsep-allow-unproven fp8-experts: {problem}")
    return te.Quantised(config, precision, rows, columns)
