"""An outcome tells what the guard decided for one microbatch of one layer, and what came of it.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_laer.arrays import Int64
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import ExactQuotas
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.quotas import SplitTotals, even_split
from megatron_laer.planner.sharding import changed_slots
from megatron_laer.planner.splits import Quotas
from megatron_laer.planner.traffic import Traffic


@dataclass(frozen=True)
class Outcome:
    """Holds what became of one microbatch.

    Attributes:
        tokens: all of the microbatch's (token, expert) pairs.
        largest_load: of a rank, in tokens.
        least_load: ceil(tokens / N), below which no layout and no split can bring the largest.
        off_node_tokens: tokens that are computed on another node than their own.
        layer_s: predicted seconds of the layer, forward and backward, with what a layout that was
            made after the gate costs.
        least_s: what no layout of this capacity and no split gets below.
        replanned: whether a layout was made after the gate, and taken.
        fetched_bytes: that the busiest rank receives for it after the gate.
        gate_s: measured seconds of the decision and the split, on the critical path.
    """

    num_ranks: int
    tokens: int
    largest_load: int
    least_load: int
    off_node_tokens: int
    layer_s: float
    least_s: float
    replanned: bool
    fetched_bytes: int
    gate_s: float

    @property
    def max_over_mean(self) -> float:
        """Return the largest over the mean rank load."""
        return self.largest_load * self.num_ranks / self.tokens

    @property
    def load_over_bound(self) -> float:
        """Return the largest load over the least that is possible; 1 is perfect."""
        return self.largest_load / self.least_load


def evaluate(guard: Guard, counts_NE: Int64, planned: ExpertLayout) -> Outcome:
    """Evaluate counts with at least one token, as training would have treated them.

    Args:
        planned: the layout that was planned for this step.

    Raises:
        ValueError: counts or a layout of another shape than the guard's.
    """
    costs, node_size, num_ranks = guard.costs, guard.geometry.node_size, planned.num_ranks
    start_s = time.perf_counter()
    decision = guard.decide(counts_NE, planned)
    # Even splits are worked out when asked for.
    loads_S = decision.quotas.loads_S
    gate_s = time.perf_counter() - start_s

    layout = decision.layout
    totals = _totals(decision.quotas, layout, node_size)
    tokens = int(counts_NE.sum())
    layer_s = costs.split_seconds(totals, layout, node_size)
    fetched_bytes = 0
    if decision.replanned:
        layer_s += costs.change_seconds(planned, layout, node_size)
        changed_S = changed_slots(planned, layout)
        fetched_bytes = busiest_rank(
            costs.restore_bytes(layout, node_size, costs.restore_algorithm, changed_S)
        )
    return Outcome(
        num_ranks=num_ranks,
        tokens=tokens,
        largest_load=int(loads_S.reshape(num_ranks, -1).sum(axis=1).max()),
        least_load=-(-tokens // num_ranks),
        off_node_tokens=int(totals.far_S.sum()),
        layer_s=layer_s,
        least_s=costs.least_layer_seconds(counts_NE, guard.geometry),
        replanned=decision.replanned,
        fetched_bytes=fetched_bytes,
        gate_s=gate_s,
    )


def restored_bytes(layout: ExpertLayout, node_size: int, costs: CostModel) -> int:
    """Return what the busiest rank receives when all slots of a layout are restored once."""
    return busiest_rank(costs.restore_bytes(layout, node_size, costs.restore_algorithm))


def busiest_rank(traffic: Traffic) -> int:
    """Return the most that one rank receives, over both link classes."""
    return int((traffic.intra_N + traffic.inter_N).max())


def _totals(quotas: Quotas, layout: ExpertLayout, node_size: int) -> SplitTotals:
    if isinstance(quotas, ExactQuotas):
        return quotas.totals()
    return even_split(layout, node_size).totals(quotas.counts_NE)
