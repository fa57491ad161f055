"""Routing traces as values, which `reading` reads from files.

Legend: R records, N source ranks, E experts. A record is one microbatch of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.files import memory
from megatron_laer.telemetry.trace_file import MAX_COUNT

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PairRecords:
    """Pairs of experts that tokens chose together, by step and layer.

    `pairs_PEE` is symmetric: the tokens of all source ranks that chose both of two experts, and on
    the diagonal those that chose one. `layer_P` indexes the trace's layers.
    """

    step_P: Int64
    layer_P: Int64
    pairs_PEE: Int32

    @classmethod
    def of_triangles(
        cls, triangles: Mapping[tuple[int, int], npt.NDArray[np.integer[Any]]], num_experts: int
    ) -> PairRecords | None:
        """Make records from upper triangles, row by row, by step and layer; None without any."""
        if not triangles:
            return None
        memory.check_enough(
            4 * len(triangles) * num_experts**2,
            f"pairs of {num_experts} experts in {len(triangles)} records",
            "give a part of the trace",
        )
        keys_P2 = np.array(sorted(triangles), dtype=np.int64)
        row_X, column_X = np.triu_indices(num_experts)
        pairs_PEE = np.empty((len(keys_P2), num_experts, num_experts), dtype=np.int32)
        for pairs_EE, key in zip(pairs_PEE, keys_P2.tolist(), strict=True):
            pairs_EE[row_X, column_X] = triangles[key[0], key[1]]
            pairs_EE[column_X, row_X] = triangles[key[0], key[1]]
        return cls(keys_P2[:, 0], keys_P2[:, 1], pairs_PEE)

    def of_layer(self, layer: int, steps: range | None = None) -> Int64:
        """Return pairs_EE, int64 [E, E], of a layer, summed over these steps or all."""
        is_in = self.layer_P == layer
        if steps is not None:
            is_in &= (steps.start <= self.step_P) & (self.step_P < steps.stop)
        summed_EE: Int64 = self.pairs_PEE[is_in].sum(axis=0, dtype=np.int64)
        return summed_EE


@dataclass(frozen=True, eq=False)
class Trace:
    """Counts of every recorded microbatch, ordered by step, layer and microbatch.

    `layer_R` indexes `layers`, which are in the model's order. `microbatch_R` counts within the
    step. `counts_RNE` has the tokens on each source rank for each expert. `pairs` are those that
    were recorded and read, and summed over all source ranks. `sets` are the experts of sampled
    tokens, bool [T, E], by step and layer.
    """

    layers: tuple[str, ...]
    step_R: Int64
    layer_R: Int64
    microbatch_R: Int64
    counts_RNE: Int32
    pairs: PairRecords | None = None
    sets: Mapping[tuple[int, int], Bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order_R = np.lexsort((self.microbatch_R, self.layer_R, self.step_R))
        if not np.array_equal(order_R, np.arange(len(order_R))):
            for name in ("step_R", "layer_R", "microbatch_R", "counts_RNE"):
                object.__setattr__(self, name, getattr(self, name)[order_R])

    @property
    def num_ranks(self) -> int:
        return int(self.counts_RNE.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.counts_RNE.shape[2])

    def __len__(self) -> int:
        return len(self.counts_RNE)

    def counts_NE(self, record: int) -> Int64:
        counts_NE: Int64 = self.counts_RNE[record].astype(np.int64)
        return counts_NE

    def total_NE(self, records: Sequence[int]) -> Int64:
        """Return the summed counts of some records."""
        if isinstance(records, range):  # without a copy
            part_RNE = self.counts_RNE[records.start : records.stop]
        else:
            part_RNE = self.counts_RNE[list(records)]
        summed_NE: Int64 = part_RNE.sum(axis=0, dtype=np.int64)
        return summed_NE

    def part(self, records: slice | Bool) -> Trace:
        """Return the trace of some records alone, without pairs and sets."""
        return Trace(
            self.layers,
            self.step_R[records],
            self.layer_R[records],
            self.microbatch_R[records],
            self.counts_RNE[records],
        )

    def tokens_per_rank(self, top_k: int) -> int:
        """Return the mean tokens of a rank and microbatch, at least 1."""
        pairs = int(self.counts_RNE.sum(dtype=np.int64))
        return max(1, pairs // (len(self) * self.num_ranks * top_k))

    def with_ranks(self, num_ranks: int) -> Trace:
        """Return the same tokens on another number of source ranks.

        Fewer ranks: neighbours are merged. More: each rank's tokens are dealt out to its successors
        like cards, expert after expert. Their numbers of tokens differ by at most one.
        """
        self.check_divides(num_ranks)
        recorded = self.num_ranks
        if num_ranks == recorded:
            return self
        if recorded % num_ranks == 0:
            grouped = self.counts_RNE.reshape(len(self), num_ranks, -1, self.num_experts)
            merged = grouped.sum(axis=2, dtype=np.int64)
            if int(merged.max()) > MAX_COUNT:
                raise ValueError(f"merged counts exceed {MAX_COUNT} tokens; use more ranks")
            return replace(self, counts_RNE=merged.astype(np.int32))
        return replace(self, counts_RNE=_dealt_out(self.counts_RNE, num_ranks // recorded))

    def divides(self, num_ranks: int) -> bool:
        """Return whether `with_ranks` can make this number of ranks."""
        recorded = self.num_ranks
        return num_ranks >= 1 and (recorded % num_ranks == 0 or num_ranks % recorded == 0)

    def check_divides(self, num_ranks: int) -> None:
        """Raise ValueError for a number of ranks that `with_ranks` cannot make."""
        if self.divides(num_ranks):
            return
        recorded = self.num_ranks
        works = [size for size in range(1, recorded + 1) if recorded % size == 0]
        raise ValueError(
            f"a trace of {recorded} source ranks cannot be planned for {num_ranks} ranks; use one "
            f"of {works} or a multiple of {recorded}"
        )


def _dealt_out(counts_RNE: Int32, parts: int) -> Int32:
    share_RNE, left_RNE = np.divmod(counts_RNE, parts)
    # Each expert's remainder starts where the previous one's ended.
    begin_RNE = np.cumsum(left_RNE, axis=2, dtype=np.int64) - left_RNE
    dealt = np.empty((*counts_RNE.shape[:2], parts, counts_RNE.shape[2]), dtype=np.int32)
    for part in range(parts):
        dealt[:, :, part] = share_RNE + ((part - begin_RNE) % parts < left_RNE)
    return dealt.reshape(len(counts_RNE), -1, counts_RNE.shape[2])
