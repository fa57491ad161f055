"""These are the experts' sizes of public models, on the ranks that they are trained with here."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.planner.layout import default_capacity


@dataclass(frozen=True)
class Model:
    """Describes the experts of one MoE layer on one rank.

    Attributes:
        ranks: N of the FSEP group.
        tokens: of a rank and microbatch.
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
        """C, as FSEP takes it by default."""
        return default_capacity(self.ranks, self.experts)

    @property
    def rows(self) -> int:
        """What a rank computes of a balanced microbatch: a row for each expert of a token."""
        return self.tokens * self.topk


MODELS = (
    Model("Mixtral-8x7B", 4096, 14336, 8, 2, ranks=8),
    Model("Qwen3-30B-A3B", 2048, 768, 128, 8, ranks=8),
    Model("Qwen3-235B-A22B", 4096, 1536, 128, 8, ranks=64),
    Model("DeepSeek-V3", 7168, 2048, 256, 8, ranks=64),
)
TINY = (Model("tiny", 32, 48, 8, 2, ranks=8, tokens=32),)


def models(dry: bool) -> tuple[Model, ...]:
    """The models to measure."""
    return TINY if dry else MODELS


def splits(slots: int, rows: int) -> dict[str, list[int]]:
    """Rows of each slot: even, and skewed, where each slot has half of what the one before has.

    The skewed one ends with slots that have none, as FSEP's may.
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
