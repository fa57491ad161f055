"""Experts' sizes of public models, with the number of ranks for each."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.planner.layout import default_capacity


@dataclass(frozen=True)
class Model:
    """Experts of one MoE layer on one rank.

    `ranks` is N of the FSEP group; `tokens` is T of a rank and microbatch.
    """

    name: str
    hidden: int
    ffn: int
    experts: int
    topk: int
    ranks: int
    tokens: int = 4096

    @property
    def slots(self) -> int:
        """Return C, FSEP's default."""
        return default_capacity(self.ranks, self.experts)

    @property
    def rows(self) -> int:
        """Return a rank's rows of a balanced microbatch: one for each expert of a token."""
        return self.tokens * self.topk


MODELS = (
    Model("Mixtral-8x7B", 4096, 14336, 8, 2, ranks=8),
    Model("Qwen3-30B-A3B", 2048, 768, 128, 8, ranks=8),
    Model("Qwen3-235B-A22B", 4096, 1536, 128, 8, ranks=64),
    Model("DeepSeek-V3", 7168, 2048, 256, 8, ranks=64),
)
TINY = (Model("tiny", 32, 48, 8, 2, ranks=8, tokens=32),)


def models(dry: bool) -> tuple[Model, ...]:
    return TINY if dry else MODELS


def splits(slots: int, rows: int) -> dict[str, list[int]]:
    """Return the rows of each slot, split evenly, and skewed: each slot has half of the one before.

    The skewed split ends with empty slots, as FSEP's may.
    """
    even = [rows // slots + (slot < rows % slots) for slot in range(slots)]
    skewed, left = [], rows
    for slot in range(slots):
        mine = left if slot == slots - 1 and slots < 3 else (left + 1) // 2
        skewed.append(mine)
        left -= mine
    skewed[0] += left
    if slots > 2:
        skewed[0] += skewed[-1]
        skewed[-1] = 0
    return {"even": even, "skewed": skewed}
