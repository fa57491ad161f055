"""The end-to-end benchmark measures the stated quantities, at a size that shows no speed.

The comparison of token exchanges runs each day, through the same trainings and summary.
"""

from __future__ import annotations

import pytest

from benchmarks import end_to_end, routing
from benchmarks.end_to_end_cases import (
    RIVALS,
    SKEWS,
    TOKENS_OF,
    Size,
    configurations,
    token_configurations,
)
from megatron_laer.planner.balance import max_over_mean, stock_tokens_N
from megatron_laer.tools.traces.workloads import WorkloadShape, workload_counts

TINY = Size(2, 64, 64, 8, 2, 64, 16, warm_up=1, steps=2, repeats=1)
TIMES = {"median", "min", "max"}


@pytest.mark.nightly
def test_every_configuration_runs_under_the_routing_it_is_named_for(tmp_path):
    # The other workloads are similar configurations, each of which takes seconds.
    cases = [
        case
        for case in configurations(TINY, 2, tmp_path)
        if not case.name.endswith(("W0", "W1", "W2", "W3", "W6"))
    ]
    runs = end_to_end.run_all(TINY, 2, cases, tmp_path)
    result = end_to_end.summary(cases, runs, TINY)

    assert set(result["ideal_ms"]) == set(result["fsep_balanced_ms"]) == TIMES
    for kind in ("stock", "fsep", "fsep_static"):
        assert set(result[kind]) == set(SKEWS)
        assert all(set(times) == TIMES and times["min"] > 0 for times in result[kind].values())
    assert set(result["stock_max_over_mean"]) == set(SKEWS)
    assert set(result["exposed_restore_share"]) == {"scheduled", "unscheduled"}

    # Workloads: stock was as uneven as their counts are, and FSEP computed the same in balance.
    shape = TINY.routing_shape(2)
    assert set(result["share_of_forced_balance"]) == {"W5", "W7"}
    for workload, shares in result["share_of_forced_balance"].items():
        assert set(shares) == set(RIVALS)
        assert all(set(share) == TIMES and share["min"] > 0 for share in shares.values())
        stock, fsep = (runs[f"{kind}, {workload}"][0].ranks[0] for kind in ("stock", "fsep"))
        sizes = WorkloadShape(2, shape.experts, shape.topk, shape.tokens)
        counts = [workload_counts(workload, sizes, step) for step in range(len(stock.step_ms))]
        skews = [max_over_mean(stock_tokens_N(counts_NE)) for counts_NE in counts]
        assert stock.stock_skew == fsep.stock_skew == pytest.approx(skews)
        assert max(fsep.fsep_skew) < 1.1

    for skew, value in result["stock_max_over_mean"].items():
        assert routing.LEAST_SKEW <= value <= routing.MOST_SKEW, skew
        # FSEP was given the same routing as stock, and computed it in balance; static did not.
        stock, fsep, static = (
            runs[f"{kind}, {skew}"][0].ranks[0] for kind in ("stock", "fsep", "fsep static")
        )
        if skew == "fixed":  # only the bias of this routing repeats, not its noise
            assert fsep.stock_skew == pytest.approx(stock.stock_skew, rel=0.03)
        else:
            assert fsep.stock_skew == stock.stock_skew
        assert max(fsep.fsep_skew) < 1.1
        if skew != "burst":
            assert max(static.fsep_skew) > 1.1
    ideals = runs["ideal"]
    assert all(max(ideal.ranks[0].stock_skew) < 1.1 for ideal in ideals)
    # Every other one ran between two of these.
    assert all(
        run.ideals[0] is not run.ideals[1] and all(ideal in ideals for ideal in run.ideals)
        for case in cases[1:]
        for run in runs[case.name]
    )

    # Without the scheduler every exchange is waited for; static runs exchange as well.
    assert result["exposed_restore_share"]["unscheduled"] > 0
    assert all(0 < share < 1 for share in result["exposed_share_by_mode"]["scheduler off"].values())
    assert not ideals[0].ranks[0].restore_exposed_ms


def test_exchanges_of_tokens_are_compared_repeat_by_repeat(tmp_path):
    size = Size(1, 64, 32, 8, 4, 64, 4, warm_up=1, steps=1, repeats=2, more="--kv-channels 8")
    cases = token_configurations(size)
    runs = end_to_end.run_all(size, 2, cases, tmp_path)
    found = end_to_end.summary(cases, runs, size)["node_over_rank"]
    assert set(found) == set(TOKENS_OF)
    for ratios in found.values():
        assert set(ratios) == {"step", "processor"}
        assert all(set(ratio) == TIMES and ratio["min"] > 0 for ratio in ratios.values())
