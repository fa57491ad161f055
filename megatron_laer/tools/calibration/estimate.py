"""This file estimates roughly, before anything is measured, what a calibration takes of a rank."""

from __future__ import annotations

from megatron_laer.tools.calibration.settings import Settings

# FLOP/s that a rank reaches at the least: two processor cores among other work, and a small GPU.
_FLOPS_PER_S = {"cpu": 1e10, "cuda": 5e13}
_ELEMENT_BYTES = {"cpu": 4, "cuda": 2}
# Forward, and two of backward, for each of the back ends.
_PRODUCTS, _BACK_ENDS = 3, 4
# Calls before the samples: one to warm up, and two that tell how often to repeat.
_CALLS_BEFORE = 3

_GIB = 2**30


def gemm_bytes(settings: Settings) -> int:
    """Return the memory of the largest products: weights, gradients, tokens in and out."""
    tokens = settings.slots * settings.tokens[-1]
    elements = sum(
        2 * settings.slots * rows * columns + tokens * (2 * rows + columns)
        for rows, columns in settings.expert.matrices
    )
    return elements * _ELEMENT_BYTES[settings.device]


def gemm_seconds(settings: Settings) -> float:
    """Return the time of all products, were every sample as short as it may be."""
    calls = settings.rounds * _PRODUCTS * _BACK_ENDS * (_CALLS_BEFORE + settings.least_samples)
    tokens = settings.slots * sum(settings.tokens)
    return calls * tokens * settings.expert.flops_per_token / _FLOPS_PER_S[settings.device]


def check_fits(settings: Settings, free_bytes: int, longest_hours: float) -> None:
    """Refuse experts whose products would take more memory than is free, or longer.

    Args:
        free_bytes: for this rank.

    Raises:
        ValueError: with the estimate, and what to give.
    """
    expert = settings.expert
    what = f"an expert of hidden size {expert.hidden} and width {expert.ffn}"
    remedy = "give smaller --hidden and --ffn, or another --config"
    needed = gemm_bytes(settings)
    if needed > free_bytes:
        raise ValueError(
            f"{what} would take about {needed / _GIB:,.1f} GiB of a rank's memory, "
            f"{free_bytes / _GIB:,.1f} GiB are free for it; {remedy}"
        )
    hours = gemm_seconds(settings) / 3600
    if hours > longest_hours:
        quick = "" if settings.quick else ", or --quick"
        raise ValueError(
            f"{what} would take about {hours:.2g} hours on {settings.device}, more than the "
            f"{longest_hours:.2g} of --hours; {remedy}{quick}, or --hours {hours * 1.1:.2g}"
        )
