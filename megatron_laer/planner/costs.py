"""The cost model predicts the seconds of an MoE layer under a layout, and of changing the layout.

`layer_seconds` counts what a layout changes at dispatch time: expert compute and token All-to-All.
What the design schedules under computation costs nothing there: restores of planned layouts, in
forward and in backward, and the exchange of gradients; how long they take is told by
`restore_seconds` and `reduce_seconds`, by algorithm, and what of it is not hidden by
`exposed_seconds`. `change_seconds` tells what a layout costs
that is made after the gate. Hardware constants are in `clusters`, element counts of exchanges in
`traffic`.

Every rank reaches the same numbers from the same counts, bit for bit: token counts are added as
integers, floats only element by element, slot after slot, and across ranks only by maximum. No
floating-point reduction whose order NumPy chooses, and nothing measured at run time. The guard's
decisions are made by the same formulas in C++ (`native/costs.hpp`), of which these are the
definition: tests hold the two equal to the last bit.

Legend: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Recompute
from megatron_laer.config import Auto, ExchangeAlgorithm, Split
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native
from megatron_laer.planner.quotas import SplitTotals, even_split
from megatron_laer.planner.sharding import changed_slots
from megatron_laer.planner.token_prices import BY_RANK, TokenPrices, all_to_alls
from megatron_laer.planner.traffic import (
    Traffic,
    expert_elements_N,
    reduce_traffic,
    restore_traffic,
)

# Forward, and two GEMMs of the same size for each in backward; a re-run is one more forward.
_BACKWARD_GEMMS = 2
# Kernels of a layer, forward and backward, beside GEMMs and collectives: `benchmarks/launches.py`
# counts them. What each takes to start is about what such a small one takes to run.
_LAUNCHES = {ExchangeAlgorithm.FLAT: 52, ExchangeAlgorithm.NODE: 58}
# Of the counts' exchange: what a rank sends beside its counts, and the bytes of each number.
_BESIDE_COUNTS, _COUNT_BYTES = 3, 8
# Lower bounds give way by more than the rounding of what they bound, which is some 1e-15.
_BELOW_ROUNDING = 1.0 - 1e-9


@dataclass(frozen=True)
class CostModel:
    """Predicts what a layout costs, from an expert's shape and a cluster's hardware constants.

    Attributes:
        cluster: hardware constants.
        hidden: H, width of a token.
        ffn: F, width of one expert.
        gated: whether the first matrix is [2F, H] (SwiGLU and its kin) or [F, H].
        bytes_per_element: of tokens, weights and gradients on the wire; 2 for bf16.
        recompute: what backward runs again.
        restore_algorithm: how changed slots are fetched.
        tokens: how tokens travel, and how many rows they are.

    Raises:
        ValueError: a size below 1.
    """

    cluster: Cluster
    hidden: int
    ffn: int
    gated: bool
    bytes_per_element: int
    recompute: Recompute = Recompute.NONE
    restore_algorithm: ExchangeAlgorithm = ExchangeAlgorithm.FLAT
    tokens: TokenPrices = BY_RANK

    def __post_init__(self) -> None:
        for name in ("hidden", "ffn", "bytes_per_element"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Return (rows, columns) of an expert's matrices, as they are restored."""
        return ((2 if self.gated else 1) * self.ffn, self.hidden), (self.hidden, self.ffn)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's hidden state."""
        return self.hidden * self.bytes_per_element

    @property
    def flops_per_token(self) -> int:
        """Count the FLOPs of one expert's forward: a multiplication and an addition per weight."""
        return 2 * sum(rows * columns for rows, columns in self.matrices)

    def layer_seconds(
        self,
        counts_NE: Int64,
        layout: ExpertLayout,
        node_size: int,
        split: Split = Split.EXACT,
    ) -> float:
        """Predict the seconds of a layer's forward and backward; see `split_seconds`.

        Args:
            counts_NE: tokens on each source rank for each expert, int64 [N, E].
            split: how tokens are split over replicas.

        Raises:
            ValueError: counts of another shape, or a node size that does not divide N.
        """
        tables = exact_split if split == Split.EXACT else even_split
        return self.split_seconds(tables(layout, node_size).totals(counts_NE), layout, node_size)

    def split_seconds(self, totals: SplitTotals, layout: ExpertLayout, node_size: int) -> float:
        """Predict the seconds of one layer and microbatch, both passes, whose split is known.

        The busiest rank's expert compute, one GEMM per slot and matrix, plus the token exchange of
        the rank that takes longest (`TokenPrices.pass_seconds`).

        The paper adds up communication over all devices but takes the maximum of compute; here both
        are the time of one device, so their sum means something.
        """
        slot_s_S = self.cluster.gemm.unit_seconds(totals.near_S + totals.far_S)
        slot_s_NC = slot_s_S.reshape(layout.num_ranks, layout.capacity)
        rank_s_N = slot_s_NC[:, 0].copy()
        for slot in range(1, layout.capacity):
            rank_s_N += slot_s_NC[:, slot]
        expert_s = self._expert_flops * rank_s_N.max()
        shape = Geometry(layout.num_ranks, layout.num_experts, layout.capacity, node_size)
        pass_s = self.tokens.pass_seconds(totals, self.cluster, self.token_bytes)
        pass_s += self.token_latency_seconds(shape)
        return float(expert_s + self.token_passes * pass_s + self.host_seconds(shape))

    def least_layer_seconds(self, counts_NE: Int64, geometry: Geometry) -> float:
        """Return seconds that no layout of this geometry and no split gets below.

        Compute: the busiest rank has at least the mean load, and no less than the mean of all
        ranks' times, with each expert in as few GEMMs as are fastest. Tokens: what must leave ranks
        and nodes (`TokenPrices.least_pass_seconds`).
        """
        gemm, num_ranks = self.cluster.gemm, geometry.num_ranks
        loads_E = counts_NE.sum(axis=0)
        largest = np.array([-(-int(loads_E.sum()) // num_ranks)])
        # Expert after expert; NumPy's sum would choose an order.
        experts_s = float(np.cumsum(gemm.least_unit_seconds(loads_E))[-1]) / num_ranks
        expert_s = self._expert_flops * max(experts_s, float(gemm.least_unit_seconds(largest)[0]))
        pass_s = self.tokens.least_pass_seconds(
            counts_NE, geometry, self.cluster, self.token_bytes
        ) + self.token_latency_seconds(geometry)
        seconds = expert_s + self.token_passes * pass_s + self.host_seconds(geometry)
        return seconds * _BELOW_ROUNDING

    def host_seconds(self, geometry: Geometry) -> float:
        """Return what a microbatch of a layer takes the host, which the device waits for.

        The gate: counts are gathered, and each rank works out its quotas. And the start of the
        layer's small kernels. The same for any layout, so it decides nothing; a constant, as
        `solve_seconds` is. None of it is counted where nobody measured the host.
        """
        host = self.cluster.host
        if host is None:
            return 0.0
        num_ranks, node_size = geometry.num_ranks, geometry.node_size
        gate_s = host.gate.seconds(*geometry.shape)
        if num_ranks > 1:
            link = self.cluster.intra if num_ranks == node_size else self.cluster.inter
            counts = (num_ranks - 1) * (geometry.num_experts + _BESIDE_COUNTS)
            gate_s += counts * _COUNT_BYTES / link.bytes_per_s
            gate_s += self._latency_seconds(num_ranks, node_size)
        return gate_s + _LAUNCHES[self.restore_algorithm] * host.launch_s

    def token_latency_seconds(self, geometry: Geometry) -> float:
        """Return the latency of one pass of the token exchange."""
        num_ranks, node_size = geometry.num_ranks, geometry.node_size
        return self.tokens.latency_seconds(
            geometry,
            self._latency_seconds(num_ranks, node_size),
            self._latency_seconds(node_size, node_size),
            self._token_forwards,
        )

    def restore_bytes(
        self,
        layout: ExpertLayout,
        node_size: int,
        algorithm: ExchangeAlgorithm,
        changed_S: Bool | None = None,
    ) -> Traffic:
        """Return the bytes per rank and link class of one restore of a layer's experts.

        Args:
            changed_S: bool [S], the slots to fetch; None for all.

        Raises:
            ValueError: a node size that does not divide N.
        """
        traffic = restore_traffic(layout, node_size, self.matrices, algorithm, changed_S)
        return traffic.times(self.bytes_per_element)

    def reduce_bytes(
        self, layout: ExpertLayout, node_size: int, algorithm: ExchangeAlgorithm
    ) -> Traffic:
        """Return the bytes per rank and link class of one reduce of a layer's gradients.

        Raises:
            ValueError: a node size that does not divide N.
        """
        traffic = reduce_traffic(layout, node_size, self.matrices, algorithm)
        return traffic.times(self.bytes_per_element)

    def restore_seconds(
        self,
        layout: ExpertLayout,
        node_size: int,
        algorithm: ExchangeAlgorithm,
        changed_S: Bool | None = None,
    ) -> float:
        """Predict the seconds of one restore if nothing hides it; see `restore_bytes`."""
        traffic = restore_traffic(layout, node_size, self.matrices, algorithm, changed_S)
        return self._exchange_seconds(traffic, layout.num_ranks, node_size, algorithm)

    def reduce_seconds(
        self, layout: ExpertLayout, node_size: int, algorithm: ExchangeAlgorithm
    ) -> float:
        """Predict the seconds of one reduce if nothing hides it; see `reduce_bytes`."""
        traffic = reduce_traffic(layout, node_size, self.matrices, algorithm)
        return self._exchange_seconds(traffic, layout.num_ranks, node_size, algorithm)

    def exposed_seconds(self, layout: ExpertLayout, node_size: int, beside_s: float) -> float:
        """Predict what of a layout's restores and reduce is not hidden, in forward and backward.

        Each is scheduled under the layer before, in the order of the pass; attention between MoE
        layers hides more, which is not counted.

        Args:
            beside_s: predicted seconds of a layer beside this one, both passes.
        """
        restore_s = self.restore_seconds(layout, node_size, self.restore_algorithm)
        forward_s = max(restore_s - beside_s * self.forward_share, 0.0)
        return forward_s + self.exposed_backward_seconds(layout, node_size, beside_s)

    def exposed_backward_seconds(
        self, layout: ExpertLayout, node_size: int, beside_s: float
    ) -> float:
        """Predict what of a layout's restore and reduce is not hidden in backward.

        With the flat exchange it is the same for any layout. See `exposed_seconds`.
        """
        # A reduce is a restore run backwards, and takes as long.
        exchange_s = 2 * self.restore_seconds(layout, node_size, self.restore_algorithm)
        return max(exchange_s - (beside_s - beside_s * self.forward_share), 0.0)

    def with_exchange(self, algorithm: ExchangeAlgorithm | Auto, geometry: Geometry) -> CostModel:
        """Return the same with another exchange; `auto` takes the faster for such layouts."""
        if algorithm == Auto.AUTO:
            static = ExpertLayout.static(*geometry.shape)
            # Two restores for each reduce; the first of equals is the flat one.
            chosen = min(
                ExchangeAlgorithm,
                key=lambda name: (
                    2 * self.restore_seconds(static, geometry.node_size, name)
                    + self.reduce_seconds(static, geometry.node_size, name)
                ),
            )
        else:
            chosen = ExchangeAlgorithm(algorithm)
        return replace(self, restore_algorithm=chosen)

    def solve_seconds(self, geometry: Geometry) -> float:
        """Return the time of a fresh layout and its exact quotas, a constant.

        A time measured at run time would differ between ranks, and so would their decisions.
        """
        return self.cluster.solve.seconds(*geometry.shape)

    def change_seconds(self, before: ExpertLayout, after: ExpertLayout, node_size: int) -> float:
        """Predict what a layout made after the gate costs over a planned one; 0 for the same.

        The solve, and in forward the fetch of the changed slots, which starts when the gate is
        known and which the experts wait for. The other slots were restored ahead for the planned
        layout. Backward prefetches and delays exchanges as it does the planned layout's; what of
        them is exposed, which the guard weighs too, is told by `exposed_backward_seconds`.

        Raises:
            ValueError: layouts of different shapes, or a node size that does not divide N.
        """
        changed_S = changed_slots(before, after)
        geometry = Geometry(before.num_ranks, before.num_experts, before.capacity, node_size)
        if not changed_S.any():
            return 0.0
        fetch_s = self.restore_seconds(after, node_size, self.restore_algorithm, changed_S)
        return fetch_s + self.solve_seconds(geometry)

    def least_change_seconds(self, geometry: Geometry) -> float:
        """Return what no change of layout gets below: the solve, and one expert for one rank."""
        return _least_change_seconds(self, geometry)

    def for_native(self, geometry: Geometry) -> native.CostModel:
        """Return the constants of layouts of this geometry, as the native guard reads them."""
        num_ranks, node_size = geometry.num_ranks, geometry.node_size
        intra, inter = self.cluster.intra, self.cluster.inter
        return native.CostModel(
            *self.cluster.gemm.columns(),
            self._expert_flops,
            self.forward_share,
            self.token_passes,
            *self.tokens.pair_bytes(self.token_bytes),
            self.tokens.in_stages,
            self.bytes_per_element,
            intra.bytes_per_s,
            inter.bytes_per_s,
            self.token_latency_seconds(geometry),
            self.host_seconds(geometry),
            self.restore_algorithm == ExchangeAlgorithm.NODE,
            self._exchange_latency_seconds(num_ranks, node_size, self.restore_algorithm),
            self.solve_seconds(geometry),
            self.least_change_seconds(geometry),
            expert_elements_N(self.matrices, num_ranks),
        )

    @property
    def forward_share(self) -> float:
        """Return the part of a layer's time that hides a restore in forward; backward is the rest.

        The smaller one of its shares: of the experts' passes, and of All-to-Alls, where it has two.
        """
        return min(1.0 / self._passes, 2.0 / self.token_passes)

    @property
    def token_passes(self) -> int:
        """Count the All-to-Alls of tokens, in forward, in a re-run that has them, in backward."""
        return all_to_alls(self._token_forwards)

    @property
    def _token_forwards(self) -> int:
        return 2 if self.recompute == Recompute.FULL else 1

    @property
    def _passes(self) -> float:
        """Count the experts' passes, a backward one by how long it takes; recompute is backward."""
        forwards = 1 if self.recompute == Recompute.NONE else 2
        return forwards + _BACKWARD_GEMMS * self.cluster.backward_gemm_factor

    @property
    def _expert_flops(self) -> float:
        """Count the FLOPs per token over all passes."""
        return self._passes * self.flops_per_token

    def _exchange_seconds(
        self, traffic: Traffic, num_ranks: int, node_size: int, algorithm: ExchangeAlgorithm
    ) -> float:
        wire_s = traffic.seconds(
            algorithm,
            self.bytes_per_element,
            self.cluster.intra.bytes_per_s,
            self.cluster.inter.bytes_per_s,
        )
        return wire_s + self._exchange_latency_seconds(num_ranks, node_size, algorithm)

    def _exchange_latency_seconds(
        self, num_ranks: int, node_size: int, algorithm: ExchangeAlgorithm
    ) -> float:
        if algorithm == ExchangeAlgorithm.NODE:  # two collectives, one after the other
            latency_s = self.cluster.collective_seconds(node_size - 1, 0)
            latency_s += self.cluster.collective_seconds(0, num_ranks // node_size - 1)
        else:
            latency_s = self._latency_seconds(num_ranks, node_size)
        return len(self.matrices) * latency_s

    def _latency_seconds(self, num_ranks: int, node_size: int) -> float:
        """Return the latency of one collective over all ranks."""
        return self.cluster.collective_seconds(node_size - 1, num_ranks - node_size)


@lru_cache(maxsize=64)
def _least_change_seconds(costs: CostModel, geometry: Geometry) -> float:
    """Take one slot of rank 0, with as many rows on every rank as the smallest slice has.

    Every term of either algorithm's traffic grows with the changed slots and with rows, so no
    change moves less; and with equal slices it does not matter which slot it is.
    """
    num_ranks = geometry.num_ranks
    layout = ExpertLayout.static(*geometry.shape)
    first_S = np.arange(geometry.num_slots) == 0
    matrices = [(rows // num_ranks * num_ranks, columns) for rows, columns in costs.matrices]
    algorithm = costs.restore_algorithm
    traffic = restore_traffic(layout, geometry.node_size, matrices, algorithm, first_S)
    fetch_s = costs._exchange_seconds(traffic, num_ranks, geometry.node_size, algorithm)
    return (fetch_s + costs.solve_seconds(geometry)) * _BELOW_ROUNDING
