"""Widths of an expert, from a model configuration or of the paper's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.tools.model_flags import model_values, whole_number

# Maximum width, far above any model's; products of two, in bytes, stay far below 2**63.
MAX_WIDTH = 2**20


@dataclass(frozen=True)
class ExpertSizes:
    """Widths of an expert, and the number of experts of a token."""

    hidden: int
    ffn: int
    gated: bool
    num_experts: int | None = None
    top_k: int = 2

    @property
    def widths(self) -> str:
        return f"{self.hidden} x {self.ffn}{'' if self.gated else ', not gated'}"


# Mixtral-8x7B's experts, as in the paper.
DEFAULT_SIZES = ExpertSizes(hidden=4096, ffn=14336, gated=True)

# Megatron's flags for activations that multiply two halves of the first matrix's output.
_GATED: Sequence[str] = ("--swiglu", "--quick-geglu")


def model_sizes(config: str) -> ExpertSizes:
    """Read the widths from a model configuration, given by path or by a shipped one's name."""
    values = model_values(config)

    def size(flag: str, most: int) -> int:
        way_out = "mend it, or give --hidden and --ffn instead of --config"
        return whole_number(values, flag, most, least=1, way_out=way_out)

    own_ffn, top_k = "--moe-ffn-hidden-size", "--moe-router-topk"
    return ExpertSizes(
        size("--hidden-size", MAX_WIDTH),
        size(own_ffn if own_ffn in values else "--ffn-hidden-size", MAX_WIDTH),
        any(flag in values for flag in _GATED),
        size("--num-experts", MAX_EXPERTS),
        size(top_k, MAX_EXPERTS) if top_k in values else ExpertSizes.top_k,
    )
