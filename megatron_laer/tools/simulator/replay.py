"""Replay of a recorded run with the forecast, planner and guard of training.

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_laer.arrays import Int64
from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.files import memory
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import ExactQuotas
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.quotas import SplitTotals, even_split
from megatron_laer.planner.traffic import Traffic
from megatron_laer.tools.simulator.node_rows import NodeRows
from megatron_laer.tools.traces.records import Trace

# Measured bytes per count [N, E] of a forecast, and of the current case.
_FORECAST_BYTES, _WORKING_BYTES = 16, 170


def walk(
    trace: Trace, lag: int, total_NE: Callable[[Sequence[int]], Int64]
) -> Iterator[tuple[int, int, list[int], SmoothedForecast | None]]:
    """Yield step, layer, records and their forecast, in order.

    The newest counts of a forecast are `lag` steps old, among steps that recorded the layer;
    it is None before there are so many. `total_NE` sums the counts of records.
    """
    keys = list(zip(trace.step_R.tolist(), trace.layer_R.tolist(), strict=True))
    states: dict[int, deque[SmoothedForecast]] = {}
    for (step, layer), group in groupby(range(len(trace)), key=keys.__getitem__):
        records = list(group)
        known = states.setdefault(layer, deque(maxlen=lag))  # oldest first
        yield step, layer, records, known[0] if len(known) == lag else None
        known.append((known[-1] if known else SmoothedForecast()).observe(total_NE(records)))


def kept_forecasts(trace: Trace, lag: int) -> int:
    return len(trace.layers) * (min(lag, len(set(trace.step_R.tolist()))) + 1)


def check_memory(
    num_ranks: int, num_experts: int, *, record_bytes: int, forecasts: int, purpose: str
) -> None:
    """Refuse a replay that would take more memory than is free.

    `record_bytes` are of all records, per count [N, E].
    """
    per_count = record_bytes + _FORECAST_BYTES * forecasts + _WORKING_BYTES
    needed = num_ranks * num_experts * per_count
    share = memory.available_bytes() / needed
    memory.check_enough(needed, purpose, f"give --ranks of at most {int(num_ranks * share):,}")


@dataclass(frozen=True)
class Outcome:
    """Loads, traffic and times of one microbatch of one layer, under the guard's decision.

    `tokens` are (token, expert) pairs; `least_load` is ceil(tokens / N). `layer_s` is predicted,
    for both directions and with a layout made after the gate. With experts at home, it includes the
    exposed exchanges of replicas, whose number depends on the layout. `least_s` is its bound over
    all layouts of this capacity and all splits. `fetched_bytes` are the busiest rank's for such a
    layout. `gate_s` is measured: decision and split, on the critical path.
    """

    num_ranks: int
    tokens: int
    largest_load: int
    least_load: int
    node_rows: NodeRows
    layer_s: float
    least_s: float
    replanned: bool
    fetched_bytes: int
    gate_s: float

    @property
    def max_over_mean(self) -> float:
        return self.largest_load * self.num_ranks / self.tokens

    @property
    def load_over_bound(self) -> float:
        return self.largest_load / self.least_load


def evaluate(guard: Guard, counts_NE: Int64, planned: ExpertLayout) -> Outcome:
    """Decide on counts with at least one token, as in training; `planned` is the step's layout."""
    costs, node_size, num_ranks = guard.costs, guard.geometry.node_size, planned.num_ranks
    start_s = time.perf_counter()
    decision = guard.decide(counts_NE, planned)
    # Even splits are computed at this first use, so it is timed too.
    loads_S = decision.quotas.loads_S
    gate_s = time.perf_counter() - start_s

    totals = split_totals(guard, decision)
    tokens = int(counts_NE.sum())
    layer_s = costs.split_seconds(totals, guard.geometry)
    least_s = costs.least_layer_seconds(counts_NE, guard.geometry)
    if guard.geometry.home_slots:
        layer_s += _exposed_seconds(guard, decision, least_s)
    fetched_bytes = 0
    if decision.replanned:
        layer_s += costs.change_seconds(planned, Placed(decision.layout, guard.geometry))
        fetched_bytes = busiest_rank(changed_traffic(guard, decision))
    return Outcome(
        num_ranks=num_ranks,
        tokens=tokens,
        largest_load=int(loads_S.reshape(num_ranks, -1).sum(axis=1).max()),
        least_load=-(-tokens // num_ranks),
        node_rows=NodeRows.of(counts_NE, node_size, totals, costs.tokens),
        layer_s=layer_s,
        least_s=least_s,
        replanned=decision.replanned,
        fetched_bytes=fetched_bytes,
        gate_s=gate_s,
    )


def _exposed_seconds(guard: Guard, decision: Decision, beside_s: float) -> float:
    """Predict exposed exchanges, in forward of the planned layout, in backward of the chosen.

    The host's time for the chosen one's replicas comes on top.
    """
    costs = guard.costs
    planned = Placed(decision.planned_layout, guard.geometry)
    chosen = Placed(decision.layout, guard.geometry)
    planned_s = costs.exposed_seconds(planned, beside_s)
    forward_s = planned_s - costs.exposed_backward_seconds(planned, beside_s)
    chosen_s = costs.exposed_backward_seconds(chosen, beside_s)
    return forward_s + chosen_s + costs.replicas_host_seconds(chosen, beside_s)


def split_totals(guard: Guard, decision: Decision) -> SplitTotals:
    if isinstance(decision.quotas, ExactQuotas):
        return decision.quotas.totals()
    split = even_split(decision.layout, guard.geometry.node_size)
    return split.totals(decision.quotas.counts_NE)


def changed_traffic(guard: Guard, decision: Decision) -> Traffic:
    """Return the traffic of the slots that a layout made after the gate changes."""
    chosen = Placed(decision.layout, guard.geometry)
    changed_S = chosen.changed_S(Placed(decision.planned_layout, guard.geometry))
    return guard.costs.restore_bytes(chosen, changed_algorithm(guard, decision), changed_S)


def changed_algorithm(guard: Guard, decision: Decision) -> ExchangeAlgorithm:
    """Return the exchange that fetches the slots of `changed_traffic`."""
    return guard.costs.exchange_of(Placed(decision.layout, guard.geometry))


def restored_bytes(placed: Placed, costs: CostModel) -> int:
    """Return the bytes that the busiest rank receives when all slots are restored once."""
    return busiest_rank(costs.restore_bytes(placed, costs.exchange_of(placed)))


def busiest_rank(traffic: Traffic) -> int:
    """Return the most bytes that one rank receives, over both link classes."""
    return int((traffic.intra_N + traffic.inter_N).max())
