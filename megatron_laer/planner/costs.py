"""Cost model: predicted seconds of an MoE layer under a layout, and of a change of layout.

`layer_seconds` covers expert compute and the token All-to-Alls. Restores and gradient exchanges
overlap with compute, and `exposed` predicts the part of their time that is not hidden. `clusters`
has hardware constants, `traffic` element counts. With experts at home only replicas move, and a
layout without any costs nothing.

Over 400 lines: one model, whose Python and native forms share constants.

The formulas are native code (`native/costs.cpp`), which explains why all ranks get bitwise equal
numbers. Their constants are made here.

Legend: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Auto, ExchangeAlgorithm, Recompute, Sharding, Split
from megatron_laer.life import Kind, Kinds
from megatron_laer.planner.clusters import (
    DENSE_OPERATIONS,
    MOE_OPERATIONS,
    SLOT_OPERATIONS,
    Cluster,
)
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.gemm_curve import GemmCurve
from megatron_laer.planner.geometry import Geometry, counts_bytes
from megatron_laer.planner.hops import Way, way_of, ways_of
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.native_core import native
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.quotas import SplitTotals, even_split
from megatron_laer.planner.token_prices import BY_RANK, TokenPrices, all_to_alls
from megatron_laer.planner.traffic import (
    Traffic,
    expert_elements_N,
    reduce_traffic,
    restore_traffic,
)
from megatron_laer.planner.typical import typical_layout
from megatron_laer.planner.wire_form import WireForm, backward_restores, weights_form
from megatron_laer.precision import Precision

# Backward GEMMs per forward GEMM, of the same size: for the inputs and for the weights.
_BACKWARD_GEMMS = 2
# Small kernels of a layer's forward and backward, counted by `benchmarks/launches.py`; each takes
# about as long to start as to run.
_LAUNCHES, _LAUNCHES_OF_MORE_HOPS = 47, 3
# GEMMs around an exchange are measured a tenth to a fifth slower on cards.
_LEAST_HIDDEN_SHARE = 0.125
# Passes over rows of hidden states in forward: put in order on both ranks, there and back.
_ROW_PASSES = 8
# FLOPs of attention in forward, over the square of hidden states' width, and over the width for a
# token of a sequence: Qwen3's, whose queries are wide. The latter take 1.6 times as long as GEMMs.
_ATTENTION_FLOPS, _PRODUCT_FLOPS = 9.0, 6.4
# Part of a card's memory that rows above the mean may take, where the host hides their time.
_IMBALANCE_PART = 1 / 8
# Slack of lower bounds, above the rounding errors (about 1e-15) of the bounded times.
_BELOW_ROUNDING = 1.0 - 1e-9


class Exposed(NamedTuple):
    """Predicted seconds of a layout's exchanges that the layer next to it does not hide.

    Attributes:
        forward_s, backward_s: of restores, and in backward of the reduce. Backward's are equal for
            all layouts of rows with `flat`.
        host_s: of the host's work for replicas, as far as the device is not later; the same for all
            layouts of rows.
    """

    forward_s: float
    backward_s: float
    host_s: float

    @property
    def exchanges_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class CostModel:
    """Prices of layouts, from an expert's shape and a cluster's hardware constants.

    Attributes:
        hidden, ffn: H, width of a token, and F, width of one expert.
        gated: whether the first matrix is [2F, H] (SwiGLU) or [F, H].
        bytes_per_element: size of tokens, weights and gradients on the wire, but for payloads.
        restore_algorithm: exchange that fetches changed slots.
        tokens: exchange of tokens, and rows of hidden states per (token, expert) pair.
        pairs_per_rank: these pairs of one rank in a microbatch, which give forecasts their unit;
            None if not known.
        tokens_per_rank: tokens that have these pairs.
        by_layout: whether each layout of home experts is fetched by its fastest way;
            `restore_algorithm` is then that of typical loads.
        precision: of experts' products, and of home experts on the wire. Layers whose experts are
            not quantised have prices of their own, `in_bf16`.
        layers: whose rows a rank holds at once: as many as the model has, or twice with combined
            1F1B and no pipeline. None takes the device to hide all of the host's work.
        sharers: ranks that share a sequence, of which a microbatch is taken to have one.
        kinds: of the run. Held over a step, an exchange is shared by microbatches, and in combined
            1F1B tokens travel during another one's compute.
    """

    cluster: Cluster
    hidden: int
    ffn: int
    gated: bool
    bytes_per_element: int
    recompute: Recompute = Recompute.NONE
    restore_algorithm: ExchangeAlgorithm = ExchangeAlgorithm.FLAT
    tokens: TokenPrices = BY_RANK
    pairs_per_rank: int | None = None
    tokens_per_rank: int | None = None
    by_layout: bool = False
    precision: Precision = Precision.PARAMETERS
    layers: int | None = None
    sharers: int = 1
    kinds: Kinds = frozenset()

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn", "bytes_per_element"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    @property
    def is_combined(self) -> bool:
        return Kind.PARTS in self.kinds

    @property
    def in_bf16(self) -> CostModel:
        """Return the prices of a layer whose experts are not quantised."""
        return replace(self, precision=Precision.PARAMETERS)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Return (rows, columns) of an expert's matrices, as they are restored."""
        return ((2 if self.gated else 1) * self.ffn, self.hidden), (self.hidden, self.ffn)

    @property
    def gemm(self) -> GemmCurve:
        """Return the speed of the experts' GEMMs."""
        return self.cluster.gemm_in(self.precision)

    @property
    def grads_form(self) -> WireForm:
        """Return the form of gradients, and of weights that are not quantised."""
        return WireForm(self.matrices, self.bytes_per_element)

    def weights_form(self, sharding: Sharding) -> WireForm:
        """Return the form of weights in restores; only home experts are quantised."""
        if sharding == Sharding.ROWS:
            return self.grads_form
        return weights_form(self.precision, self.matrices, self.bytes_per_element)

    def backward_restores(self, sharding: Sharding) -> int:
        """Return the restores of a layer's backward; forward has one more."""
        return backward_restores(self.weights_form(sharding).directions, self.recompute)

    @property
    def token_bytes(self) -> int:
        return self.hidden * self.bytes_per_element

    @property
    def flops_per_token(self) -> int:
        """Return the FLOPs per token of one expert's forward: one multiply-add per weight."""
        return 2 * sum(rows * columns for rows, columns in self.matrices)

    def layer_seconds(self, counts_NE: Int64, placed: Placed, split: Split = Split.EXACT) -> float:
        """Predict the seconds of a layer's forward and backward for counts [N, E]."""
        tables = exact_split if split == Split.EXACT else even_split
        totals = tables(placed.layout, placed.geometry.node_size).totals(counts_NE)
        return self.split_seconds(totals, placed.geometry)

    def split_seconds(self, totals: SplitTotals, geometry: Geometry) -> float:
        """Predict the seconds of a layer's forward and backward from its split's totals."""
        return native.layer_seconds(
            self.for_native(geometry),
            totals.near_S,
            totals.far_S,
            totals.sent_near_N,
            totals.sent_far_N,
            totals.own_N,
        )

    def least_layer_seconds(self, counts_NE: Int64, geometry: Geometry) -> float:
        """Return a lower bound of a layer's seconds over all layouts and splits."""
        geometry.check_counts(counts_NE.shape)
        return native.least_layer_seconds(self.for_native(geometry), counts_NE)

    def host_seconds(self, geometry: Geometry) -> float:
        """Return the host's seconds per microbatch of a layer, for which the device waits.

        At the gate, counts are gathered and each rank computes its quotas. Then the layer's small
        kernels are started. The same for every layout; zero where the host was not measured.
        """
        host = self.cluster.host
        if host is None:
            return 0.0
        num_ranks, node_size = geometry.num_ranks, geometry.node_size
        gate_s = host.gate.seconds(*geometry.shape)
        if num_ranks > 1:
            link = self.cluster.intra if num_ranks == node_size else self.cluster.inter
            received = (num_ranks - 1) * counts_bytes(geometry.num_experts)
            gate_s += received / link.bytes_per_s
            gate_s += self._latency_seconds(num_ranks, node_size)
        hops = len(way_of(geometry, self.restore_algorithm).links)
        launches = _LAUNCHES + _LAUNCHES_OF_MORE_HOPS * (hops > 1)
        return gate_s + launches * host.launch_s

    def hidden_by_host(self, geometry: Geometry) -> tuple[float, float]:
        """Return the seconds of home experts and tokens that the host hides, and the most rows.

        A layer that fetches an expert takes the host at least so long, less the device's time for
        the rest of the layer. So no replica makes a layer faster that takes less without any. The
        rows are the busiest rank's over the mean, for which a card has room. No imbalance is hidden
        (0, 1) where host, card, tokens or the number of layers are not known.
        """
        host, card, tokens = self.cluster.host, self.cluster.card, self.tokens_per_rank
        if host is None or card is None or tokens is None or self.layers is None:
            return 0.0, 1.0
        passes = self._forwards + _BACKWARD_GEMMS
        operations = DENSE_OPERATIONS + MOE_OPERATIONS
        operations += SLOT_OPERATIONS * (geometry.home_slots + 1)
        host_s = passes * host.forward_seconds(operations) + host.replicas_s
        flops = _ATTENTION_FLOPS * self.hidden + _PRODUCT_FLOPS * tokens * self.sharers
        flops *= tokens * self.hidden
        rest_s = self._passes * flops / max(speed for _, speed in self.gemm.points)
        pair_bytes = (self.pairs_per_rank or tokens) * self.bytes_per_element
        in_experts = (3 if self.gated else 2) * self.ffn
        moved = passes * pair_bytes * (_ROW_PASSES * self.hidden + in_experts)
        rest_s += moved / self.cluster.memory_rate(self.bytes_per_element)
        # Rows stay for backward as they arrive and leave, and without recompute inside experts.
        kept = 2 * self.hidden + in_experts * (self.recompute == Recompute.NONE)
        room = card.memory_gib * 2**30 * _IMBALANCE_PART / (self.layers * pair_bytes * kept)
        return max(host_s - rest_s, 0.0), 1.0 + room

    def token_latency_seconds(self, geometry: Geometry) -> float:
        """Return the latency of one pass of the token exchange."""
        num_ranks, node_size = geometry.num_ranks, geometry.node_size
        return self.tokens.latency_seconds(
            geometry,
            self._latency_seconds(num_ranks, node_size),
            self._latency_seconds(node_size, node_size),
            self._token_forwards,
        )

    def restore_bytes(self, placed: Placed, way: Way, changed_S: Bool | None = None) -> Traffic:
        """Return one restore's bytes per rank and link class, of all slots or of `changed_S`."""
        form = self.weights_form(placed.geometry.sharding)
        traffic = restore_traffic(placed, form.matrices, way, changed_S)
        return traffic.times(form.bytes_per_element)

    def reduce_bytes(self, placed: Placed, way: Way) -> Traffic:
        """Return the bytes per rank and link class of one reduce of a layer's gradients."""
        return reduce_traffic(placed, self.matrices, way).times(self.bytes_per_element)

    def exposed(self, placed: Placed, beside_s: float) -> Exposed:
        """Predict the times of a layout's exchanges that are not hidden.

        `beside_s` is the predicted time of both passes of the layer that hides them.
        """
        slots_S = placed.layout.slot_expert_S
        _, *seconds = native.exposed(self.for_native(placed.geometry), slots_S, beside_s)
        return Exposed(*seconds)

    def exchanges_seconds(self, placed: Placed, beside_s: float) -> float:
        """Predict the time that a layout's restores and reduce add to a layer and microbatch.

        It is their exposed time, `hidden_share` of the rest, and the host's.
        """
        exposed = self.exposed(placed, beside_s)
        hidden_s = self.exposed(placed, 0.0).exchanges_s - exposed.exchanges_s
        return exposed.exchanges_s + self.hidden_share(placed.geometry) * hidden_s + exposed.host_s

    def with_exchange(self, algorithm: ExchangeAlgorithm | Auto, geometry: Geometry) -> CostModel:
        """Return the model with this exchange; `auto` is the faster one for a typical layout.

        That is the static one; with home experts, one for log-normal loads, and each layout is
        then fetched by its own fastest way.
        """
        if algorithm == Auto.AUTO:
            every = replace(self, by_layout=True)
            widths = every.way_of(Placed(typical_layout(geometry), geometry)).widths
            words = (of for of in ExchangeAlgorithm if way_of(geometry, of).widths == widths)
            chosen = next(words, ExchangeAlgorithm.NODE)  # a relay in nodes has no word of its own
        else:
            chosen = ExchangeAlgorithm(algorithm)
        by_layout = algorithm == Auto.AUTO and geometry.home_slots > 0
        return replace(self, restore_algorithm=chosen, by_layout=by_layout)

    def ways(self, geometry: Geometry) -> tuple[Way, ...]:
        """Return the ways by which layouts can be fetched."""
        return ways_of(geometry) if self.by_layout else (way_of(geometry, self.restore_algorithm),)

    def way_of(self, placed: Placed) -> Way:
        """Return the way of a layout: the fastest whose buffers have room, then the first."""
        first, *others = ways = self.ways(placed.geometry)
        if not others:
            return first
        costs, slots_S = self.for_native(placed.geometry), placed.layout.slot_expert_S
        at, *_ = native.exposed(costs, slots_S, 0.0)
        return ways[at]

    def solve_seconds(self, geometry: Geometry) -> float:
        """Return the time of a fresh layout and exact quotas; a constant, so ranks decide alike."""
        return self.cluster.solve.seconds(*geometry.shape)

    def change_seconds(self, before: ExpertLayout, after: Placed) -> float:
        """Predict the cost of replacing a planned layout after the gate; 0 if no slot changes.

        It is the solve and forward's fetch; the guard also weighs the exposed backward. A slot that
        becomes empty needs no fetch.
        """
        after.geometry.check_shape_of(before)
        if before == after.layout:
            return 0.0
        slots = before.slot_expert_S, after.layout.slot_expert_S
        return native.change_seconds(self.for_native(after.geometry), *slots)

    def least_change_seconds(self, geometry: Geometry) -> float:
        """Return a lower bound of changes that fetch: the solve, and one expert for one rank."""
        return _least_change_seconds(self, geometry)

    def for_native(self, geometry: Geometry) -> native.CostModel:
        """Return the native form of the model for layouts of this geometry."""
        return _for_native(self, geometry)

    @property
    def forward_share(self) -> float:
        """Return the part of a layer's time that hides a restore in forward; backward is the rest.

        The smaller of forward's shares of the experts' passes and of the All-to-Alls.
        """
        return min(1.0 / self._passes, 2.0 / self.token_passes)

    def hidden_share(self, geometry: Geometry) -> float:
        """Return the time that a hidden exchange adds to a layer, as a part of the exchange.

        Compute is slower by the measured contention, by an eighth of the exchange at least. Tokens
        arrive as much later as both are on the links. A step's one exchange takes a microbatch
        next to nothing.
        """
        if Kind.STEP in self.kinds:
            return 0.0
        contention = self.cluster.contention
        share = contention.exchange * (1.0 - 1.0 / contention.gemm)
        return min(max(share, _LEAST_HIDDEN_SHARE) + self._tokens_part(geometry), 1.0)

    def _tokens_part(self, geometry: Geometry) -> float:
        """Return the part of a layer's time in which tokens are between nodes, for even counts.

        Inside nodes links are fast, and nothing is added. Attention takes about as long as experts.
        """
        if self.pairs_per_rank is None:
            return 0.0
        _, inter_bytes = self.tokens.pair_bytes(self.token_bytes)
        leaving = self.pairs_per_rank * (1.0 - geometry.node_size / geometry.num_ranks)
        pass_s = leaving * inter_bytes / self.cluster.inter.bytes_per_s
        tokens_s = self.token_passes * pass_s
        homes = geometry.num_experts / geometry.num_ranks
        unit_s = self.gemm.unit_seconds(np.array([max(round(self.pairs_per_rank / homes), 1)]))
        compute_s = 2.0 * self._expert_flops * homes * float(unit_s[0])
        return tokens_s / (compute_s if self.is_combined else compute_s + tokens_s)

    @property
    def token_passes(self) -> int:
        """Return the number of token All-to-Alls of forward, re-run (if any) and backward."""
        return all_to_alls(self._token_forwards)

    @property
    def _token_forwards(self) -> int:
        return 2 if self.recompute == Recompute.FULL else 1

    @property
    def _forwards(self) -> int:
        return 1 if self.recompute == Recompute.NONE else 2

    @property
    def _passes(self) -> float:
        """Return the time of all the experts' passes in units of a forward one."""
        return self._forwards + _BACKWARD_GEMMS * self.cluster.backward_gemm_factor

    @property
    def _expert_flops(self) -> float:
        return self._passes * self.flops_per_token

    def _latency_of(self, way: Way) -> float:
        """Return the latency of an exchange, hop after hop."""
        peers = (link.peers(way.geometry) for link in way.links[::-1])
        return sum(self.cluster.collective_seconds(*of) for of in peers)

    def _carried(self, form: WireForm, num_ranks: int) -> native.Carried:
        each, rates = form.bytes_per_element, self.cluster.exchange_rates
        intra_rate, inter_rate = rates(self.bytes_per_element, form.quantising_passes)
        held_N = expert_elements_N(form.matrices, num_ranks)
        return native.Carried(each / intra_rate, each / inter_rate, held_N)

    def _latency_seconds(self, num_ranks: int, node_size: int) -> float:
        return self.cluster.collective_seconds(node_size - 1, num_ranks - node_size)


@lru_cache(maxsize=64)
def _least_change_seconds(costs: CostModel, geometry: Geometry) -> float:
    """Price one slot of rank 0, with the smallest slice's number of rows on every rank.

    All terms of traffic grow with changed slots and rows, so no change moves less. A replica next
    to home experts comes from the next or the last rank, directly or by relay.
    """
    num_ranks, home = geometry.num_ranks, geometry.home_slots
    form = costs.weights_form(geometry.sharding)
    matrices = tuple((rows // num_ranks * num_ranks, columns) for rows, columns in form.matrices)
    carried = costs._carried(replace(form, matrices=matrices), num_ranks)
    static_S = geometry.static_layout.slot_expert_S
    fetches_s = []
    for expert in (home, geometry.num_experts - 1) if home else (static_S[0],):
        slots_S = np.full_like(static_S, EMPTY)
        slots_S[home] = expert
        for way in costs.ways(geometry):
            fetches_s.append(
                native.exchange_seconds(way.native, costs._latency_of(way), carried, slots_S)
            )
    return (min(fetches_s) + costs.solve_seconds(geometry)) * _BELOW_ROUNDING


@lru_cache(maxsize=64)
def _for_native(costs: CostModel, geometry: Geometry) -> native.CostModel:
    intra, inter = costs.cluster.intra, costs.cluster.inter
    host_forward_s = host_slot_s = replicas_host_s = 0.0
    if (host := costs.cluster.host) is not None:
        slots = geometry.home_slots or geometry.capacity
        host_forward_s = host.forward_seconds(MOE_OPERATIONS + SLOT_OPERATIONS * slots)
        host_slot_s, replicas_host_s = host.forward_seconds(SLOT_OPERATIONS), host.replicas_s
    return native.CostModel(
        *costs.gemm.columns(),
        costs._expert_flops,
        costs.forward_share,
        costs.token_passes,
        *costs.tokens.pair_bytes(costs.token_bytes),
        costs.tokens.in_stages,
        intra.bytes_per_s,
        inter.bytes_per_s,
        costs.token_latency_seconds(geometry),
        costs.host_seconds(geometry),
        host_forward_s,
        host_slot_s,
        replicas_host_s,
        *costs.hidden_by_host(geometry),
        [(way.native, costs._latency_of(way)) for way in costs.ways(geometry)],
        costs.solve_seconds(geometry),
        costs.least_change_seconds(geometry),
        costs.hidden_share(geometry),
        costs.pairs_per_rank or 0,
        costs._carried(costs.weights_form(geometry.sharding), geometry.num_ranks),
        costs._carried(costs.grads_form, geometry.num_ranks),
        costs.backward_restores(geometry.sharding),
    )
