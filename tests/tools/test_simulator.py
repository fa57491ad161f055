"""The table of `plan` against plain recomputation, and its memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from megatron_laer.files import memory
from megatron_laer.planner.balance import max_over_mean, stock_tokens_N
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.strategies import make_strategy, strategy_names
from megatron_laer.tools.simulator.comparison import MODES, STOCK, chosen_cases, simulate
from megatron_laer.tools.simulator.replay import check_memory, walk
from megatron_laer.tools.traces.records import Trace
from tests.tools.plan_cases import COSTS, drifting_trace, table


@pytest.fixture(scope="module")
def trace():
    return drifting_trace()


@pytest.fixture(scope="module")
def rows(trace):
    return table(trace)


def test_a_row_is_what_a_plain_loop_over_the_steps_gives(trace):
    geometry = Geometry(4, 8, 3, 2)
    greedy = make_strategy("greedy", geometry=geometry, costs=COSTS)
    ratios, off_node, tokens, seconds = [], 0, 0, 0.0
    for layer in range(2):
        layout = ExpertLayout.static(4, 3, 8)
        states = [SmoothedForecast()]
        for step in range(6):
            records = np.flatnonzero((trace.step_R == step) & (trace.layer_R == layer))
            if step >= 1:
                layout = greedy.plan(states[step].counts_NE(), layout)
                for record in records:
                    counts_NE = trace.counts_NE(record)
                    quotas = exact_split(layout, 2).solve(counts_NE)
                    ratios.append(max_over_mean(quotas.rank_loads_N()))
                    off_node += int(quotas.totals().far_S.sum())
                    tokens += int(counts_NE.sum())
                    seconds += COSTS.layer_seconds(counts_NE, Placed(layout, geometry))
            total_NE = sum(trace.counts_NE(record) for record in records)
            states.append(states[-1].observe(total_NE))
    row = table(trace, strategies=["greedy"], modes=["forecast"])["greedy", "forecast"]
    assert row.cases == len(ratios) == 2 * 5 * 3
    assert row.mean == pytest.approx(np.mean(ratios))
    assert row.p99 == pytest.approx(np.percentile(ratios, 99))
    assert row.off_node_share == pytest.approx(off_node / tokens)
    assert row.layer_ms == pytest.approx(seconds / len(ratios) * 1e3)


def test_the_papers_planner_sees_the_newest_microbatches_of_its_layer_alone(trace):
    """A step has three of each layer, so that five are not next to each other in the trace."""
    for (step, layer, _), observed in walk(trace):
        if observed is not None:
            before_R = np.flatnonzero((trace.step_R < step) & (trace.layer_R == layer))
            expected_NE = trace.counts_RNE[before_R[-5:]].sum(axis=0)
            assert (observed.total_NE(observed.newest) == expected_NE).all()


def test_stock_is_megatrons_placement_and_restores_nothing(trace, rows):
    expected = [
        max_over_mean(stock_tokens_N(trace.counts_NE(record)))
        for record in range(len(trace))
        if trace.step_R[record] > 0
    ]
    row = rows[STOCK, "-"]
    assert row.mean == pytest.approx(np.mean(expected))
    assert (row.capacity, row.restored_bytes, row.replan_share) == (2, 0, 0)


def test_rows_are_in_the_order_that_was_asked_for(rows):
    expected = [(STOCK, "-"), ("static", "forecast"), ("laer", "forecast")]
    expected += [("greedy", mode) for mode in MODES]
    assert list(rows) == expected
    # There is no stock row where experts do not divide.
    assert (STOCK, "-") not in table(drifting_trace(experts=9), modes=["forecast"])


def test_modes_do_what_they_promise(rows):
    forecast, exact = rows["greedy", "forecast"], rows["greedy", "exact"]
    assert exact.p99 < 1.001 < 1.05 < forecast.p99
    assert forecast.replan_share == 0
    assert exact.replan_share > 0.9
    adaptive = rows["greedy", "adaptive"]
    assert adaptive.layer_ms <= min(forecast.layer_ms, exact.layer_ms)
    assert rows["greedy", "tolerance"].p99 <= 1.05
    assert 0 < rows["greedy", "tolerance"].replan_share < 1


def test_a_forward_pass_restores_all_slots_and_what_changed_after_the_gate(rows):
    ahead_bytes = 3 * (3 * 4096 * 14336 * 2) * 3 / 4
    assert rows["greedy", "forecast"].restored_bytes == ahead_bytes
    assert ahead_bytes < rows["greedy", "exact"].restored_bytes <= 2 * ahead_bytes


def cases_of(trace, **more):
    return table(trace, strategies=["static"], modes=["forecast"], **more)["static", "forecast"]


def test_every_kth_case_is_a_part_of_all_of_them_and_the_bar_counts_it(trace, rows):
    seen = []

    def progress(cases):
        yield from cases
        seen.append(len(cases))

    part, whole = cases_of(trace, every=7, progress=progress), rows["static", "forecast"]
    assert seen == [part.cases] == [-(-whole.cases // 7)]
    assert chosen_cases(trace, 7) == chosen_cases(trace, 1)[::7]


def test_microbatches_without_tokens_or_forecast_are_no_cases(trace):
    counts = trace.counts_RNE.copy()
    counts[-1] = 0
    fewer = Trace(trace.layers, trace.step_R, trace.layer_R, trace.microbatch_R, counts)
    assert cases_of(fewer).cases == 2 * 5 * 3 - 1
    # A layer that starts late has cases from its second step on.
    of = np.flatnonzero((trace.layer_R == 0) | (trace.step_R >= 4))
    keys = (trace.step_R[of], trace.layer_R[of], trace.microbatch_R[of])
    assert cases_of(Trace(trace.layers, *keys, trace.counts_RNE[of])).cases == 5 * 3 + 1 * 3


def test_a_plan_takes_no_more_memory_than_is_asked_for(trace, monkeypatch):
    wide = trace.with_ranks(512)
    tracemalloc.start()
    simulate(wide, {Geometry(512, 8, 3, 8): COSTS}, strategy_names(), MODES)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = {"record_bytes": 4 * len(wide), "purpose": "planning"}
    with monkeypatch.context() as patched:
        asked = []
        patched.setattr(memory, "check_enough", lambda needed, *_: asked.append(needed))
        check_memory(wide, 512, **sizes)
    # A process of any size uses the first part.
    assert peak_bytes < 2**24 + asked[0]
    monkeypatch.setattr(memory, "available_bytes", lambda: asked[0] // 4)
    with pytest.raises(ValueError, match=r"planning would take .* give --ranks of at most 12[78]$"):
        check_memory(wide, 512, **sizes)
