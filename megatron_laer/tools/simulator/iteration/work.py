"""Work of a microbatch in one MoE layer, by rank.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, X ranks of an expert-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.choices import Dispatch
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Link
from megatron_laer.planner.quotas import SplitTotals
from megatron_laer.planner.token_prices import BY_RANK, TokenPrices
from megatron_laer.planner.traffic import Traffic
from megatron_laer.planner.wire_form import WireForm
from megatron_laer.tools.simulator.iteration.rates import Rates

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Exchange:
    """Bytes of one exchange of parameters or gradients.

    `intra_bytes` and `inter_bytes` are the most that any rank sends or receives. `links` are those
    of its hops, one after the other. `quantising_passes` and `directions` are those of `WireForm`.
    """

    intra_bytes: float
    inter_bytes: float
    links: tuple[Link, ...]
    geometry: Geometry
    quantising_passes: float = 0.0
    directions: int = 1

    @classmethod
    def of(cls, traffic: Traffic, form: WireForm, geometry: Geometry) -> Exchange:
        """Make an exchange from bytes per rank of `CostModel.restore_bytes` or `reduce_bytes`."""
        return cls(
            float(np.maximum(traffic.intra_N, traffic.sent_intra_N).max()),
            float(np.maximum(traffic.inter_N, traffic.sent_inter_N).max()),
            traffic.links,
            geometry,
            form.quantising_passes,
            form.directions,
        )

    def seconds(self, rates: Rates) -> float:
        """Return the time from the last rank's start, as in `CostModel`."""
        intra_rate, inter_rate = rates.cluster.exchange_rates(
            rates.bytes_per_element, self.quantising_passes
        )
        intra_s, inter_s = self.intra_bytes / intra_rate, self.inter_bytes / inter_rate
        latency_s = 0.0
        for link in reversed(self.links):
            near, far = link.peers(self.geometry)
            latency_s += rates.collective_seconds(1 + near + far, 1 + near)
        wire_s = max(intra_s, inter_s) if len(self.links) == 1 else intra_s + inter_s
        return wire_s + latency_s


@dataclass(frozen=True)
class TokenPassing:
    """Way of a method's tokens between ranks.

    `group` is the number of neighbours that exchange tokens and counts; None for all ranks. With
    `sorts_chunks` rows are put in order by Megatron's All-to-All dispatcher.
    """

    group: int | None = None
    prices: TokenPrices = BY_RANK
    sorts_chunks: bool = False

    def seconds(self, work: LayerWork, token_bytes: int, cluster: Cluster) -> Seconds:
        """Return each rank's time on the links for the work's pairs, without latency."""
        intra_bytes, inter_bytes = self.prices.pair_bytes(token_bytes)
        intra_s_N = work.intra_N * (intra_bytes / cluster.intra.bytes_per_s)
        inter_s_N = work.inter_N * (inter_bytes / cluster.inter.bytes_per_s)
        if self.prices.dispatch == Dispatch.NODE:
            seconds_N: Seconds = np.add(intra_s_N, inter_s_N, dtype=np.float64)
        else:
            seconds_N = np.maximum(intra_s_N, inter_s_N, dtype=np.float64)
        return seconds_N


@dataclass(frozen=True, eq=False)
class LayerWork:
    """Work of one microbatch of one MoE layer under a method.

    `unit_s_N` are seconds of each rank's expert GEMMs per FLOP of a token, at the nominal rates.
    `pairs_N` are the (token, expert) pairs that it computes. `intra_N` and `inter_N` are pairs in
    one token exchange, the larger of sent and received. `change` is of slots that differ from the
    planned layout, and `solve_s` makes a layout after the gate. `used_slots` are the most of a rank
    that have tokens.
    """

    unit_s_N: Seconds
    pairs_N: Int64
    intra_N: Int64
    inter_N: Int64
    restore: Exchange | None
    reduce: Exchange | None
    change: Exchange | None
    solve_s: float
    slots: int
    used_slots: int
    passing: TokenPassing

    @property
    def leaves_nodes(self) -> bool:
        """Return True if any token is computed on another node than its own."""
        return bool(self.inter_N.any())

    @property
    def exchanges_leave_nodes(self) -> bool:
        """Return True if any weight or gradient travels between nodes."""
        moved = self.restore, self.reduce, self.change
        return any(each is not None and each.inter_bytes > 0 for each in moved)

    @property
    def max_over_mean(self) -> float:
        total = int(self.pairs_N.sum())
        return int(self.pairs_N.max()) * self.pairs_N.size / total if total else 1.0

    @classmethod
    def of(
        cls,
        totals: SplitTotals,
        rates: Rates,
        restore: Exchange | None = None,
        reduce: Exchange | None = None,
        change: Exchange | None = None,
        solve_s: float = 0.0,
        passing: TokenPassing | None = None,
        node_size: int = 1,
    ) -> LayerWork:
        num_ranks = len(totals.own_N)

        def by_rank(of_slots_S: Int64) -> Int64:
            sums_N: Int64 = of_slots_S.reshape(num_ranks, -1).sum(axis=1)
            return sums_N

        passing = passing or TokenPassing()
        near_N, far_N = by_rank(totals.near_S) - totals.own_N, by_rank(totals.far_S)
        intra_N = np.maximum(totals.sent_near_N - totals.own_N, near_N)
        if passing.prices.in_stages:  # a row from another node is passed on inside
            intra_N = near_N + far_N
        pairs_S = totals.near_S + totals.far_S
        unit_s_S = rates.linear_gemm.unit_seconds(pairs_S)
        return cls(
            unit_s_N=unit_s_S.reshape(num_ranks, -1).sum(axis=1),
            pairs_N=near_N + far_N + totals.own_N,
            intra_N=intra_N,
            inter_N=np.maximum(totals.sent_far_N, passing.prices.arriving_N(far_N, node_size)),
            restore=restore,
            reduce=reduce,
            change=change,
            solve_s=solve_s,
            slots=len(totals.near_S) // num_ranks,
            used_slots=int(by_rank((pairs_S > 0).astype(np.int64)).max()),
            passing=passing,
        )


def grouped_totals(counts_NE: Int64, group: int, node_size: int) -> SplitTotals:
    """Return the totals of stock's placement in groups of X = `group` neighbours.

    A group has every expert once, E/X in a row on each rank, and no token leaves it.
    """
    num_ranks, num_experts = counts_NE.shape
    assert num_ranks % group == 0 and num_experts % group == 0
    each = num_experts // group
    slot_NS = counts_NE.reshape(num_ranks // group, group, group, each)  # group, source, rank, slot
    rank = np.arange(num_ranks).reshape(-1, group)
    same_node = (rank[:, :, None] // node_size) == (rank[:, None, :] // node_size)
    near_S = (slot_NS * same_node[..., None]).sum(axis=1).reshape(-1)
    sent_near_N = (slot_NS.sum(axis=3) * same_node).sum(axis=2).reshape(-1)
    own = np.arange(group)
    return SplitTotals(
        near_S=near_S,
        far_S=slot_NS.sum(axis=1).reshape(-1) - near_S,
        sent_near_N=sent_near_N,
        sent_far_N=counts_NE.sum(axis=1) - sent_near_N,
        own_N=slot_NS.sum(axis=3)[:, own, own].reshape(-1),
    )
