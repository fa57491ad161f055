"""The cost model in NumPy, term by term as in `native/costs.cpp`; equal to the last bit.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.gemm_curve import GemmCurve
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import Way
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.quotas import SplitTotals
from megatron_laer.planner.traffic import Traffic, reduce_traffic, restore_traffic
from megatron_laer.planner.wire_form import WireForm

# Lower bounds are reduced by more than rounding, which is some 1e-15.
_BELOW_ROUNDING = 1.0 - 1e-9


def split_seconds(costs: CostModel, totals: SplitTotals, geometry: Geometry) -> float:
    """Return seconds of one layer and microbatch: integer token counts, floats by slot."""
    slot_s_S = costs.gemm.unit_seconds(totals.near_S + totals.far_S)
    slot_s_NC = slot_s_S.reshape(geometry.num_ranks, geometry.capacity)
    rank_s_N = slot_s_NC[:, 0].copy()
    for slot in range(1, geometry.capacity):
        rank_s_N += slot_s_NC[:, slot]
    expert_s = costs._expert_flops * rank_s_N.max()
    pass_s = _pass_seconds(costs, totals, geometry) + costs.token_latency_seconds(geometry)
    return float(expert_s + costs.token_passes * pass_s + costs.host_seconds(geometry))


def least_layer_seconds(costs: CostModel, counts_NE: Int64, geometry: Geometry) -> float:
    """Return seconds that no layout and no split can beat."""
    gemm, num_ranks = costs.gemm, geometry.num_ranks
    loads_E = counts_NE.sum(axis=0)
    largest = np.array([-(-int(loads_E.sum()) // num_ranks)])
    # Expert after expert; NumPy's sum would choose an order.
    experts_s = float(np.cumsum(least_unit_seconds(gemm, loads_E))[-1]) / num_ranks
    largest_s = float(least_unit_seconds(gemm, largest)[0])
    expert_s = costs._expert_flops * max(experts_s, largest_s)
    pass_s = _least_pass_seconds(costs, counts_NE, geometry)
    pass_s += costs.token_latency_seconds(geometry)
    seconds = expert_s + costs.token_passes * pass_s + costs.host_seconds(geometry)
    return seconds * _BELOW_ROUNDING


def least_unit_seconds(gemm: GemmCurve, tokens: Int64) -> npt.NDArray[np.float64]:
    """Return the least seconds of these tokens, however they are divided into GEMMs.

    Use the highest speed up to their number. Between points speed is monotone, since time is linear
    there, so that is the speed of a point below, or theirs in one GEMM.
    """
    tokens_P, *_, best_P = gemm.columns()
    point = np.searchsorted(tokens_P, tokens, side="right")
    at_best = np.where(point > 0, tokens / best_P[np.maximum(point - 1, 0)], math.inf)
    return np.minimum(gemm.unit_seconds(tokens), at_best)


def change_seconds(costs: CostModel, before: ExpertLayout, after: Placed) -> float:
    """Return the seconds of the solve and of fetching the changed slots; 0 for the same layout."""
    if before == after.layout:
        return 0.0
    changed_S = after.changed_S(Placed(before, after.geometry))
    fetch_s = restore_seconds(costs, after, way_of(costs, after), changed_S)
    return fetch_s + costs.solve_seconds(after.geometry)


def exposed_seconds(costs: CostModel, placed: Placed, beside_s: float) -> tuple[float, float]:
    """Return the exposed seconds next to a layer of `beside_s`, of both passes and of backward."""
    way = way_of(costs, placed)
    restore_s, reduce_s = restore_seconds(costs, placed, way), reduce_seconds(costs, placed, way)
    forward_s = max(restore_s - beside_s * costs.forward_share, 0.0)
    exchanges_s = costs.backward_restores(placed.geometry.sharding) * restore_s + reduce_s
    backward_s = max(exchanges_s - (beside_s - beside_s * costs.forward_share), 0.0)
    return forward_s + backward_s, backward_s


def way_of(costs: CostModel, placed: Placed) -> Way:
    """Return the way of a layout: by itself the fastest one with room, of equals the first."""
    restores = 1 + costs.backward_restores(placed.geometry.sharding)

    def whole_s(way: Way) -> float:
        restore_s = restore_seconds(costs, placed, way)
        return restores * restore_s + reduce_seconds(costs, placed, way)

    ways = costs.ways(placed.geometry)
    return min((way for way in ways if way is ways[-1] or has_room(way, placed)), key=whole_s)


def has_room(way: Way, placed: Placed) -> bool:
    """Return whether a relay over all ranks has buffers for what ranks send by this way."""
    geometry = placed.geometry
    home, node_size = geometry.home_slots, geometry.node_size
    if not way.is_direct and not way.spreads_in_nodes:
        return True
    (slot_S,) = placed.filled_S.nonzero()
    expert_S = placed.replica_expert_S[placed.filled_S]
    most = max(home, geometry.replica_slots)
    if way.is_direct:
        return bool(np.bincount(expert_S // home).max(initial=0) <= most)
    # Each rank of a node sends its part of the node's experts to every node that wants them.
    to_S = slot_S // geometry.replica_slots // node_size
    pairs = {*zip(expert_S.tolist(), to_S.tolist(), strict=True)}
    sent_Q = np.bincount([expert // home // node_size for expert, _ in pairs])
    return bool(sent_Q.max(initial=0) <= most * node_size)


def restore_seconds(
    costs: CostModel, placed: Placed, way: Way, changed_S: Bool | None = None
) -> float:
    """Return the seconds of one restore that nothing hides, of all slots or of `changed_S`."""
    form = costs.weights_form(placed.geometry.sharding)
    traffic = restore_traffic(placed, form.matrices, way, changed_S)
    return _exchange_seconds(costs, traffic, form, placed.geometry)


def reduce_seconds(costs: CostModel, placed: Placed, way: Way) -> float:
    """Return the seconds of one reduce that nothing hides."""
    traffic = reduce_traffic(placed, costs.matrices, way)
    return _exchange_seconds(costs, traffic, costs.grads_form, placed.geometry)


def _exchange_seconds(
    costs: CostModel, traffic: Traffic, form: WireForm, geometry: Geometry
) -> float:
    """Add latencies to the time of the slowest rank, whose larger direction counts.

    One hop drives both link classes at once, so the slower class counts; times of more add up.
    """
    moved_N = [
        np.maximum(traffic.intra_N, traffic.sent_intra_N),
        np.maximum(traffic.inter_N, traffic.sent_inter_N),
    ]
    if geometry.home_slots and not np.any(moved_N):
        return 0.0
    rates = costs.cluster.exchange_rates(costs.bytes_per_element, form.quantising_passes)
    seconds = [
        float((of_N * (form.bytes_per_element / rate)).max())
        for of_N, rate in zip(moved_N, rates, strict=True)
    ]
    latency_s = 0.0
    for link in reversed(traffic.links):
        latency_s += costs.cluster.collective_seconds(*link.peers(geometry))
    wire_s = max(seconds) if len(traffic.links) == 1 else sum(seconds)
    return wire_s + latency_s


def _pass_seconds(costs: CostModel, totals: SplitTotals, geometry: Geometry) -> float:
    tokens, cluster = costs.tokens, costs.cluster
    near_N = totals.near_S.reshape(len(totals.own_N), -1).sum(axis=1)
    far_N = totals.far_S.reshape(len(totals.own_N), -1).sum(axis=1)
    inside_N = near_N + far_N if tokens.in_stages else np.maximum(totals.sent_near_N, near_N)
    intra = (inside_N - totals.own_N).max()
    if tokens.in_stages:  # between nodes, all ranks of a node receive alike
        far_N = -(-far_N.reshape(-1, geometry.node_size).sum(axis=1) // geometry.node_size)
    inter = max(totals.sent_far_N.max(), far_N.max())
    intra_bytes, inter_bytes = tokens.pair_bytes(costs.token_bytes)
    intra_s = float(intra * (intra_bytes / cluster.intra.bytes_per_s))
    inter_s = float(inter * (inter_bytes / cluster.inter.bytes_per_s))
    return intra_s + inter_s if tokens.in_stages else max(intra_s, inter_s)


def _least_pass_seconds(costs: CostModel, counts_NE: Int64, geometry: Geometry) -> float:
    num_ranks, node_size, capacity = geometry.num_ranks, geometry.node_size, geometry.capacity
    intra, inter = costs.cluster.intra, costs.cluster.inter
    _, inter_bytes = costs.tokens.pair_bytes(costs.token_bytes)
    pass_s = 0.0
    if num_ranks > 1 and not costs.tokens.in_stages:
        near_bytes_per_s = intra.bytes_per_s if node_size > 1 else 0.0
        far_bytes_per_s = inter.bytes_per_s if geometry.num_nodes > 1 else 0.0
        pass_s = _least_leaving(counts_NE, capacity) / (near_bytes_per_s + far_bytes_per_s)
    if geometry.num_nodes > 1:
        node_counts_QE = counts_NE.reshape(geometry.num_nodes, node_size, -1).sum(axis=1)
        leaving = _least_leaving(node_counts_QE, node_size * capacity)
        pass_s = max(pass_s, leaving / node_size / inter.bytes_per_s)
    return pass_s * inter_bytes


def _least_leaving(counts: Int64, kept_experts: int) -> int:
    """Return the tokens that leave the row that keeps fewest, if rows keep their top experts'."""
    others = counts.shape[1] - kept_experts
    if others <= 0:
        return 0
    return int(np.partition(counts, others - 1, axis=1)[:, :others].sum(axis=1).max())
