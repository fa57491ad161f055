"""Traffic: elements that exchanges of parameters and gradients put on the links.

They are sums over the hops of `hops.py`. The runtime's exchanges count their traffic, and tests
compare both.

Legend: N ranks, C slots per rank that can be fetched, S = N·C such slots. A matrix has R rows and
K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.hops import Link, Way
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.native_core import native
from megatron_laer.planner.placed import Placed, row_bounds


@dataclass(frozen=True, eq=False)
class Traffic:
    """Elements of one exchange per rank and link class, int64 [N], without those that stay.

    Elements received (`intra_N`, `inter_N`) and sent are separate because their maxima differ.
    Ranks of a node with many distinct experts receive more than others send; with few changed
    slots, nearly all ranks send while few receive. Links are full duplex, so the larger of the two
    counts.

    Attributes:
        links: of the hops, one All-to-All after the other.
    """

    intra_N: Int64
    inter_N: Int64
    sent_intra_N: Int64
    sent_inter_N: Int64
    links: tuple[Link, ...] = (Link.ALL,)

    def reversed(self) -> Traffic:
        sent = self.sent_intra_N, self.sent_inter_N
        return Traffic(*sent, self.intra_N, self.inter_N, self.links)

    def times(self, factor: int) -> Traffic:
        received = self.intra_N * factor, self.inter_N * factor
        sent = self.sent_intra_N * factor, self.sent_inter_N * factor
        return Traffic(*received, *sent, self.links)


def restore_traffic(
    placed: Placed,
    matrices: Sequence[tuple[int, int]],
    way: Way,
    changed_S: Bool | None = None,
    *,
    before: Placed | None = None,
) -> Traffic:
    """Count the elements that one restore moves, as sums over its hops.

    docs/internals/communication.md has them as formulas. `node` never lets a node receive more from
    other nodes than `flat`. The same holds for each rank if N divides R and all ranks of a node
    fetch equally many slots.

    Args:
        changed_S: replica slots to fetch, by ranks that keep nothing else; all by default. Empty
            slots are not fetched.
        before: instead of `changed_S`, the layout under which all ranks keep restored experts.
    """
    assert changed_S is None or before is None, "changed_S follows from the layout before"
    geometry, slots_S = placed.geometry, placed.layout.slot_expert_S
    if changed_S is not None:
        if changed_S.shape != placed.filled_S.shape:
            raise ValueError(
                f"changed_S has shape {changed_S.shape}, expected {placed.filled_S.shape}"
            )
        slots_NC = slots_S.reshape(geometry.num_ranks, -1).copy()
        slots_NC[:, geometry.home_slots :][~changed_S.reshape(geometry.num_ranks, -1)] = EMPTY
        slots_S = slots_NC.reshape(-1)
    before_S = None if before is None else before.layout.slot_expert_S
    held_N = expert_elements_N(matrices, geometry.num_ranks)
    return Traffic(*native.traffic(way.native, slots_S, before_S, held_N), way.links)


def expert_elements_N(matrices: Sequence[tuple[int, int]], num_ranks: int) -> Int64:
    """Count the elements of one expert on each rank, over all matrices."""
    elements_N = np.zeros(num_ranks, dtype=np.int64)
    for rows, columns in matrices:
        elements_N += np.diff(row_bounds(rows, num_ranks)) * columns
    return elements_N


def reduce_traffic(placed: Placed, matrices: Sequence[tuple[int, int]], way: Way) -> Traffic:
    """Count the elements of one gradient exchange: a restore of all slots, run backwards.

    Elements between nodes may have another dtype (`--fsep-set grad_wire_dtype`).
    """
    return restore_traffic(placed, matrices, way).reversed()
