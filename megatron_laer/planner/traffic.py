"""Traffic: elements that exchanges of parameters and gradients put on the links.

They are sums over the hops of `hops.py`. The runtime's exchanges count their traffic, and tests
compare both.

Legend: N ranks, C slots per rank that can be fetched, S = N·C such slots, B = N row blocks of a
matrix. A matrix has R rows and K columns. X experts that a hop moves, each to one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.hops import Link, way_of
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

    def seconds(
        self, bytes_per_element: float, intra_bytes_per_s: float, inter_bytes_per_s: float
    ) -> float:
        """Predict the duration of an exchange from each rank's own link rates, without latency.

        One hop drives both link classes at once: the slower class of the slowest rank counts. Times
        of several hops add up.
        """
        intra_s_N = np.maximum(self.intra_N, self.sent_intra_N) * (
            bytes_per_element / intra_bytes_per_s
        )
        inter_s_N = np.maximum(self.inter_N, self.sent_inter_N) * (
            bytes_per_element / inter_bytes_per_s
        )
        if len(self.links) == 1:
            return float(np.maximum(intra_s_N, inter_s_N).max())
        return float(intra_s_N.max() + inter_s_N.max())

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
    algorithm: ExchangeAlgorithm,
    changed_S: Bool | None = None,
    *,
    before: Placed | None = None,
) -> Traffic:
    """Count the elements that one restore moves, as sums over its hops.

    docs/communication.md has them as formulas. `node` never lets a node receive more from other
    nodes than `flat`. The same holds for each rank if N divides R and all ranks of a node fetch
    equally many slots.

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
    block_B = expert_elements_N(matrices, geometry.num_ranks)
    received, sent = np.zeros((2, 2, geometry.num_ranks), dtype=np.int64)
    way = way_of(geometry, algorithm)
    for hop in native.hops(way.native, slots_S, before_S):
        source, target = Places(*hop[:2]), Places(*hop[2:])
        received += _elements(target, source, block_B, geometry.node_size)
        sent += _elements(source, target, block_B, geometry.node_size)
    return Traffic(received[0], received[1], sent[0], sent[1], way.links)


class Places(NamedTuple):
    """Places of one holding, of `width` ranks each, that have the X experts of a hop."""

    width: int
    place_X: Int64


def _elements(mine: Places, other: Places, block_B: Int64, node_size: int) -> Int64:
    """Count the elements that each rank exchanges in a hop with its node and beyond it, [2, N].

    For each expert of its place, a rank exchanges its blocks, each with one rank of the other
    place. The narrower places' widths divide those of the wider.
    """
    rank_N = np.arange(len(block_B))
    node_N = rank_N // node_size
    narrow, wide = sorted((mine, other), key=lambda places: places.width)

    def blocks_of(width: int) -> Int64:
        """Return the elements of every `width`-th block, from each rank's own on."""
        of_local: Int64 = block_B.reshape(-1, width).sum(axis=0)
        return of_local[rank_N % width]

    def count(place_X: Int64, width: int) -> Int64:
        return np.bincount(place_X, minlength=len(block_B) // width)[rank_N // width]

    own_X = narrow.place_X * narrow.width // wide.width == wide.place_X
    own_N = count(narrow.place_X[own_X], narrow.width) * blocks_of(wide.width)
    all_N = count(mine.place_X, mine.width) * blocks_of(mine.width)
    if other.width > node_size:  # the other place has ranks in all nodes
        width = min(mine.width, node_size)
        of_node = block_B.reshape(-1, node_size // width, width).sum(axis=1)
        near_N = count(mine.place_X, mine.width) * of_node[node_N, rank_N % width]
    elif mine.width > node_size:
        near_X = other.place_X * other.width // node_size
        near_N = np.bincount(near_X, minlength=node_N[-1] + 1)[node_N] * blocks_of(mine.width)
    else:
        of_mine = mine.place_X * mine.width // node_size
        near_X = of_mine == other.place_X * other.width // node_size
        near_N = count(mine.place_X[near_X], mine.width) * blocks_of(mine.width)
    return np.stack([near_N - own_N, all_N - near_N])


def expert_elements_N(matrices: Sequence[tuple[int, int]], num_ranks: int) -> Int64:
    """Count the elements of one expert on each rank, over all matrices."""
    elements_N = np.zeros(num_ranks, dtype=np.int64)
    for rows, columns in matrices:
        elements_N += np.diff(row_bounds(rows, num_ranks)) * columns
    return elements_N


def reduce_traffic(
    placed: Placed, matrices: Sequence[tuple[int, int]], algorithm: ExchangeAlgorithm
) -> Traffic:
    """Count the elements of one gradient exchange: a restore of all slots, run backwards.

    Elements between nodes may have another dtype (`--fsep-set grad_wire_dtype`).
    """
    return restore_traffic(placed, matrices, algorithm).reversed()
