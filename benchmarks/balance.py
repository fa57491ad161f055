"""Table that compares the balance of all planners on a routing trace, case by case.

The layout of a case comes from its predecessor: one record before it (lag `iteration`) or one
microbatch before it (lag `microbatch`).

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.costs import paper_costs
from benchmarks.flexmoe import FlexMoEStrategy
from benchmarks.rivals.eplb import Eplb
from benchmarks.splits import (
    BalanceRow,
    Outcome,
    Planner,
    Split,
    split_evenly,
    split_exactly,
    split_like_eplb,
)
from benchmarks.trace_cases import Case, Trace
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.rules import lays_out_freely

NODE_SIZE = 8
CAPACITIES = (3, 4, 6)


def balance(trace: Trace, cases: Sequence[Case]) -> Iterator[BalanceRow]:
    """Yield all rows of the table."""
    num_ranks, num_experts = trace.counts.shape[3:]
    for capacity in CAPACITIES:
        geometry = Geometry(num_ranks, num_experts, capacity, NODE_SIZE)
        costs = paper_costs()
        static = ExpertLayout.static(num_ranks, capacity, num_experts, NODE_SIZE)
        greedy = make_strategy("greedy", geometry=geometry, costs=costs)

        exact = []
        for case in cases:
            counts_NE = trace.now(case)
            layout = construct_layout(counts_NE, static, NODE_SIZE)
            exact.append(split_exactly(counts_NE, layout, NODE_SIZE))
        yield BalanceRow.of("greedy", "exact", "none", capacity, exact)

        old = forecasts(trace, cases, greedy, split_exactly, static)
        yield BalanceRow.of("greedy", "forecast", "iteration", capacity, old)
        recent = []
        for case in cases:
            before_NE = trace.before(case)
            if before_NE is None:
                continue
            layout = greedy.plan(before_NE, static)
            recent.append(split_exactly(trace.now(case), layout, NODE_SIZE))
        yield BalanceRow.of("greedy", "forecast", "microbatch", capacity, recent)

        rivals: list[tuple[Planner, Split]] = [
            (make_strategy("static", geometry=geometry, costs=costs), split_evenly),
            (make_strategy("laer", geometry=geometry, costs=costs), split_evenly),
            (Eplb(geometry), split_like_eplb),
            (FlexMoEStrategy(geometry), split_evenly),
        ]
        for planner, split in rivals:
            outcomes = forecasts(trace, cases, planner, split, static)
            yield BalanceRow.of(planner.name, "forecast", "iteration", capacity, outcomes)


def forecasts(
    trace: Trace, cases: Sequence[Case], planner: Planner, split: Split, static: ExpertLayout
) -> list[Outcome]:
    """Plan from forecasts one iteration old; a layer's layout is the `current` of its next plan."""
    expected = trace.newest if lays_out_freely(planner.name) else trace.forecast
    layouts: dict[int, ExpertLayout] = defaultdict(lambda: static)
    planned: dict[int, int] = {}
    outcomes = []
    for case in cases:
        if planned.get(case.layer) != case.iteration:
            layouts[case.layer] = planner.plan(expected(case), layouts[case.layer])
            planned[case.layer] = case.iteration
        outcomes.append(split(trace.now(case), layouts[case.layer], NODE_SIZE))
    return outcomes
