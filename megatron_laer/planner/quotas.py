"""Even split: each replica gets an equal share of a source's tokens, regardless of loads.

The paper's "lite routing": a source shares its tokens for an expert evenly among the replicas in
its own node. Only where its node has none, it shares them among all replicas. An empty slot gets
nothing. Quotas are integers, conserved, the same on every rank. Looped definition: `quota_NS` in
`tests/oracles/planner.py`.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, F slots with an expert, Q nodes, G =
N/Q ranks per node.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout, check_rank


@dataclass(frozen=True)
class SplitTotals:
    """Sums over the N*S matrix of quotas, obtained without forming it; all int64.

    Attributes:
        near_S, far_S: tokens that each slot gets from sources of its own node and of other nodes.
        sent_near_N, sent_far_N: tokens that each rank sends inside its node and to other nodes.
        own_N: tokens that each rank sends to its own slots; part of `near`.
    """

    near_S: Int64
    far_S: Int64
    sent_near_N: Int64
    sent_far_N: Int64
    own_N: Int64


@dataclass(frozen=True, eq=False)
class EvenSplit:
    """Even split for one layout and node size; `even_split` builds and caches it.

    Of c tokens over k replicas, each gets c // k. The c % k left over go to replicas source, source
    + 1, ... (mod k): a fixed first replica would collect the remainders of all sources.

    Every method takes `counts_NE`, int64 [N, E]: tokens on each source rank for each expert.
    """

    layout: ExpertLayout
    geometry: Geometry
    node_replicas_QE: Int64
    # Slots with an expert in the order (node, expert, slot) and (expert, slot), where replicas that
    # share a count are neighbours; and each slot's place among those replicas.
    near_order_F: Int64
    far_order_F: Int64
    near_place_S: Int64
    far_place_S: Int64

    def rank_row(self, counts_NE: Int64, rank: int) -> Int64:
        """Return the tokens that `rank` sends to each slot, int64 [S]. O(S)."""
        self._check(counts_NE, rank)
        quotas_1S = self._quotas(counts_NE, slice(rank, rank + 1), slice(None))
        row_S: Int64 = quotas_1S[0]
        return row_S

    def rank_columns(self, counts_NE: Int64, rank: int) -> Int64:
        """Return the tokens that each source sends to `rank`'s slots, int64 [N, C]. O(N*C)."""
        self._check(counts_NE, rank)
        first = rank * self.geometry.capacity
        return self._quotas(counts_NE, slice(None), slice(first, first + self.geometry.capacity))

    def _quotas(self, counts_NE: Int64, sources: slice, slots: slice) -> Int64:
        """Return rows and columns of the matrix of quotas."""
        geometry = self.geometry
        expert_X = self.layout.slot_expert_S[slots]
        source_R1 = np.arange(geometry.num_ranks)[sources, None]
        node_R1 = source_R1 // geometry.node_size
        slot_node_X = np.arange(geometry.num_slots)[slots] // (
            geometry.num_slots // geometry.num_nodes
        )
        is_near_RX = node_R1 == slot_node_X
        in_node_RX = self.node_replicas_QE[node_R1, expert_X]
        shared_RX = np.where(in_node_RX > 0, in_node_RX, self.layout.replicas_E[expert_X])
        share_RX, left_RX = np.divmod(counts_NE[source_R1, expert_X], shared_RX)
        place_RX = np.where(is_near_RX, self.near_place_S[slots], self.far_place_S[slots])
        serves_RX = (is_near_RX | (in_node_RX == 0)) & (expert_X != EMPTY)
        extra_RX = _gets_extra(place_RX, source_R1, shared_RX, left_RX)
        quotas_RX: Int64 = np.where(serves_RX, share_RX + extra_RX, 0)
        return quotas_RX

    def slot_loads(self, counts_NE: Int64) -> Int64:
        totals = self.totals(counts_NE)
        return totals.near_S + totals.far_S

    def totals(self, counts_NE: Int64) -> SplitTotals:
        """Return the totals of slots and ranks. O(N*E + S)."""
        geometry = self.geometry
        geometry.check_counts(counts_NE.shape)
        source_N = np.arange(geometry.num_ranks)
        node_N = source_N // geometry.node_size
        near_NE = self.node_replicas_QE[node_N] > 0

        near_group_NE = node_N[:, None] * geometry.num_experts + np.arange(geometry.num_experts)
        near_counts_NE = np.where(near_NE, counts_NE, 0)
        near_S = _group_loads(
            near_counts_NE,
            near_group_NE,
            self.node_replicas_QE.reshape(-1),
            self.near_order_F,
            geometry.num_slots,
        )
        far_group_NE = np.broadcast_to(np.arange(geometry.num_experts), counts_NE.shape)
        far_counts_NE = counts_NE - near_counts_NE
        far_S = _group_loads(
            far_counts_NE,
            far_group_NE,
            self.layout.replicas_E,
            self.far_order_F,
            geometry.num_slots,
        )

        # A rank's own slots are in its node, so their quota follows from the near replicas alone.
        rank_S = np.repeat(source_N, geometry.capacity)
        expert_S = self.layout.slot_expert_S
        shared_S = self.node_replicas_QE[rank_S // geometry.node_size, expert_S]
        shared_S[expert_S == EMPTY] = 1
        share_S, left_S = np.divmod(counts_NE[rank_S, expert_S], shared_S)
        own_S = share_S + _gets_extra(self.near_place_S, rank_S, shared_S, left_S)
        own_S[expert_S == EMPTY] = 0
        return SplitTotals(
            near_S=near_S,
            far_S=far_S,
            sent_near_N=near_counts_NE.sum(axis=1),
            sent_far_N=far_counts_NE.sum(axis=1),
            own_N=own_S.reshape(geometry.num_ranks, geometry.capacity).sum(axis=1),
        )

    def _check(self, counts_NE: Int64, rank: int) -> None:
        self.geometry.check_counts(counts_NE.shape)
        check_rank(self.geometry.num_ranks, rank)


# Room for two plans of a deep model and one solve's candidates; a table has about 32*S + 8*Q*E
# bytes.
@lru_cache(maxsize=256)
def even_split(layout: ExpertLayout, node_size: int) -> EvenSplit:
    """Return the even split of a layout on nodes of `node_size` ranks, cached by content."""
    geometry = Geometry(layout.num_ranks, layout.num_experts, layout.capacity, node_size)
    expert_S = layout.slot_expert_S.astype(np.int64)
    filled_F = np.flatnonzero(expert_S != EMPTY)
    node_S = np.arange(geometry.num_slots) // (node_size * geometry.capacity)
    group_S = node_S * geometry.num_experts + expert_S
    replicas = np.bincount(group_S[filled_F], minlength=geometry.num_nodes * geometry.num_experts)
    near_order_F, near_place_S = _order_and_place(group_S, replicas, filled_F)
    far_order_F, far_place_S = _order_and_place(expert_S, layout.replicas_E, filled_F)
    node_replicas_QE = replicas.astype(np.int64).reshape(geometry.num_nodes, geometry.num_experts)
    tables = (node_replicas_QE, near_order_F, far_order_F, near_place_S, far_place_S)
    for table in tables:
        table.setflags(write=False)
    return EvenSplit(layout, geometry, *tables)


def _order_and_place(group_S: Int64, group_sizes: Int64, filled_F: Int64) -> tuple[Int64, Int64]:
    """Sort filled slots by group, then by number; return the order and each slot's place in it."""
    order_F = filled_F[np.argsort(group_S[filled_F], kind="stable")]
    place_S = np.zeros_like(group_S)
    place_S[order_F] = np.arange(order_F.size) - np.repeat(_starts(group_sizes), group_sizes)
    return order_F, place_S


def _starts(group_sizes: Int64) -> Int64:
    starts: Int64 = np.cumsum(group_sizes) - group_sizes
    return starts


def _gets_extra(place: Int64, source: Int64 | int, shared: Int64, left: Int64) -> Bool:
    extra: Bool = (place - source) % shared < left
    return extra


def _group_loads(
    counts_NE: Int64, group_NE: Int64, group_sizes: Int64, order_F: Int64, num_slots: int
) -> Int64:
    """Return the sum of all sources' even splits, int64 [S]; each (source, expert) has one group.

    The extras of a source are a run of places in a ring. All are summed as differences at the two
    ends of each run: O(N*E + S) instead of the matrix's O(N*S).
    """
    size_NE = np.maximum(group_sizes[group_NE], 1)
    share_NE, left_NE = np.divmod(counts_NE, size_NE)
    begin_NE = np.arange(counts_NE.shape[0])[:, None] % size_NE
    end_NE = begin_NE + left_NE
    start_NE = _starts(group_sizes)[group_NE]

    num_filled = order_F.size
    # A run past the end of the ring is two runs; otherwise the second is empty (+1 and -1 cancel).
    ups = np.concatenate([start_NE + begin_NE, start_NE], axis=None)
    downs = np.concatenate(
        [start_NE + np.minimum(end_NE, size_NE), start_NE + np.maximum(end_NE - size_NE, 0)],
        axis=None,
    )
    # Clipped: an empty group at the end starts past the last slot.
    diff = np.bincount(np.minimum(ups, num_filled), minlength=num_filled + 1) - np.bincount(
        np.minimum(downs, num_filled), minlength=num_filled + 1
    )
    share = np.zeros(group_sizes.size, dtype=np.int64)
    np.add.at(share, group_NE, share_NE)
    loads_S = np.zeros(num_slots, dtype=np.int64)
    loads_S[order_F] = np.repeat(share, group_sizes) + np.cumsum(diff)[:-1]
    return loads_S
