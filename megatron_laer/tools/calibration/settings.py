"""Sizes and times of the measurements of `calibrate`, by device."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laer.tools.model_flags import ExpertSizes

START = "start at least two with `torchrun --nproc-per-node 2 -m megatron_laer calibrate FILE`"

# Tokens of a slot by `on_cuda`, up to more than any slot is likely to get.
_TOKENS = {False: (1, 4, 16, 64, 256, 1024, 4096), True: (1, 16, 64, 256, 1024, 4096, 8192)}
_QUICK_TOKENS = {False: (1, 16, 256), True: (1, 256, 4096)}
# Bytes that a rank sends in one All-to-All.
_SENT = {
    False: (2**10, 2**14, 2**17, 2**20, 2**22, 2**24, 2**25),
    True: (2**10, 2**14, 2**17, 2**20, 2**22, 2**24, 2**26, 2**28),
}
_QUICK_SENT = {False: (2**10, 2**17, 2**21), True: (2**10, 2**20, 2**26)}
# (N, C, E) of small and large layers, with few and many slots.
_SHAPES = (
    *((2, 3, 4), (8, 2, 8), (8, 4, 8), (16, 3, 32), (16, 6, 32), (32, 2, 8), (64, 2, 64)),
    *((64, 8, 256), (128, 2, 128), (256, 4, 64), (512, 2, 64)),
)
_QUICK_SHAPES = ((2, 3, 4), (16, 3, 32), (64, 8, 256))


@dataclass(frozen=True)
class CalibrationSettings:
    """Sizes and durations of all measurements; the same on every rank.

    `slots` are a rank's in one call of a back end, `tokens` each slot's, `sent_bytes` a rank's in
    one All-to-All; both increase. `shapes` are (N, C, E) of planner calls. `contended_*` are of a
    GEMM and an All-to-All that overlap. A figure has `round_s` in each of `rounds`, unless
    `least_samples` of at least `sample_s` take longer.
    """

    device: str
    expert: ExpertSizes
    slots: int
    tokens: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    shapes: tuple[tuple[int, int, int], ...]
    copy_bytes: int
    contended_tokens: int
    contended_bytes: int
    counts_experts: int
    rounds: int
    round_s: float
    sample_s: float
    least_samples: int
    node_size: int
    quick: bool

    @property
    def gemm_bytes(self) -> int:
        """Return the memory of the largest products: weights, gradients, tokens in and out."""
        tokens = self.slots * self.tokens[-1]
        elements = sum(
            2 * self.slots * rows * columns + tokens * (2 * rows + columns)
            for rows, columns in self.expert.matrices
        )
        return elements * (2 if self.device == "cuda" else 4)

    def check_memory(self, free_bytes: int) -> None:
        if self.gemm_bytes > free_bytes:
            raise ValueError(
                f"an expert of hidden size {self.expert.hidden} and width {self.expert.ffn} would "
                f"take about {self.gemm_bytes / 2**30:,.1f} GiB of a rank's memory, "
                f"{free_bytes / 2**30:,.1f} GiB are free for it; give another --config"
            )


def make_settings(
    expert: ExpertSizes, node_size: int, *, on_cuda: bool, quick: bool
) -> CalibrationSettings:
    """Choose sizes for a device; `quick` measures fewer points, in seconds, not minutes."""
    return CalibrationSettings(
        device="cuda" if on_cuda else "cpu",
        expert=expert,
        slots=2,
        tokens=(_QUICK_TOKENS if quick else _TOKENS)[on_cuda],
        sent_bytes=(_QUICK_SENT if quick else _SENT)[on_cuda],
        shapes=_QUICK_SHAPES if quick else _SHAPES,
        copy_bytes=2**30 if on_cuda else 2**26,
        contended_tokens=4096 if on_cuda else 256,
        contended_bytes=2**26 if on_cuda else 2**22,
        counts_experts=64,
        rounds=1 if quick else 3,
        round_s=0.05 if quick else 0.25,
        sample_s=0.002,
        least_samples=3,
        node_size=node_size,
        quick=quick,
    )
