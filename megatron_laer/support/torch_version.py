"""Oldest torch for FSEP on a GPU, newer than the one for the CPU."""

from __future__ import annotations

import re

OLDEST_ON_CUDA = "2.8"


def problem_on_cuda(version: str) -> str | None:
    """Return the reason and remedy if this torch cannot train on a GPU with FSEP, else None."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest = tuple(map(int, OLDEST_ON_CUDA.split(".")))
    if numbers is None or tuple(map(int, numbers.groups())) >= oldest:
        return None
    return (
        f"torch {version} on a GPU: before torch {OLDEST_ON_CUDA}, NCCL's collectives leave the "
        "stream that calls them, so exchanges of weights would not have the priority and the order "
        f"that FSEP gives them; install torch>={OLDEST_ON_CUDA}, or train on the CPU with "
        "MEGATRON_LAER_DEVICE=cpu"
    )
