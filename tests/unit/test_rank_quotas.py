"""One rank's part of a microbatch equals its definition, and the core refuses other input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.choices import PlanMode, Split
from megatron_laer.layer.dispatch.permutation import run_sizes
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import GUARD_MODES, Guard
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.native_core import native
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from tests.costs import make_costs
from tests.oracles import planner as reference
from tests.unit.planner_cases import geometries, with_holes
from tests.unit.test_guard import cases, cost_models

MODES = [*((mode, Split.EXACT) for mode in GUARD_MODES), (PlanMode.FORECAST, Split.EVEN)]


@settings(max_examples=150)
@given(cases(), cost_models(), st.sampled_from(MODES), st.integers(0, 2**16))
def test_a_rank_gets_what_follows_from_the_quotas_of_all(
    case: tuple[Geometry, Int64, ExpertLayout], costs: Any, mode: Any, seed: int
) -> None:
    geometry, counts_NE, planned = case
    rank = seed % geometry.num_ranks
    decision = Guard(mode[0], costs, geometry, split=mode[1]).decide(counts_NE, planned, rank)
    mine = decision.rank_quotas
    again = solve_quotas(mode[1], counts_NE, decision.layout, geometry.node_size)
    np.testing.assert_array_equal(mine.row_S, again.rank_row(rank))
    np.testing.assert_array_equal(mine.columns_NC, again.rank_columns(rank))
    sent_NC = mine.row_S.reshape(geometry.num_ranks, -1)
    assert mine.input_splits_N == sent_NC.sum(axis=1).tolist()
    assert mine.output_splits_N == mine.columns_NC.sum(axis=1).tolist()
    assert mine.tokens_C == mine.columns_NC.sum(axis=0).tolist()
    assert (mine.num_sent, mine.num_received) == (mine.row_S.sum(), mine.columns_NC.sum())
    np.testing.assert_array_equal(
        mine.runs, RankQuotas.of(decision.layout, mine.row_S, mine.columns_NC).runs
    )


@settings(max_examples=100)
@given(geometries(12, 24), st.integers(0, 2**16))
def test_runs_of_rows_equal_their_definition(geometry: Geometry, seed: int) -> None:
    shape = geometry.num_ranks, geometry.capacity, geometry.num_experts
    layout = with_holes(ExpertLayout.random(*shape, seed=(seed,)), (seed % 3) / 2, seed)
    rng = np.random.default_rng(seed)
    # A rank's row and columns need not match; empty slots have no tokens.
    filled_S = layout.slot_expert_S != EMPTY
    row_S = rng.integers(0, 5, geometry.num_slots) * filled_S
    columns_NC = rng.integers(0, 5, shape[:2]) * filled_S[: geometry.capacity]
    runs = RankQuotas.of(layout, row_S, columns_NC).runs
    expected = reference.token_runs(layout, row_S, columns_NC)
    assert runs.dtype == np.int32
    parts = np.split(runs, np.cumsum(run_sizes(geometry.num_slots, geometry.num_experts))[:-1])
    for (name, wanted), found in zip(expected.items(), parts, strict=True):
        assert found.tolist() == wanted, name


COUNTS_NE = np.ones((4, 6), dtype=np.int64)
SLOTS_S = ExpertLayout.static(4, 3, 6).slot_expert_S
COSTS = make_costs().for_native(Geometry(4, 6, 3, 2))


def decide(**other: Any) -> Any:
    given = {"mode": "adaptive", "costs": COSTS, "tolerance": None, "counts_NE": COUNTS_NE}
    given |= {"planned_S": SLOTS_S, "node_size": 2, "home": 0, "rank": 0}
    return native.decide(*(given | other).values())


def with_one(array: Any, value: int) -> Any:
    other = array.copy()
    other.flat[5] = value
    return other


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"mode": "guess"}, "no such mode: guess"),
        ({"costs": make_costs().for_native(Geometry(2, 6, 3, 2))}, "another shape"),
        ({"counts_NE": COUNTS_NE[0]}, r"counts must be \[N, E\]"),
        ({"counts_NE": COUNTS_NE[:0]}, r"counts must be \[N, E\]"),
        ({"counts_NE": COUNTS_NE[:, :5]}, "a slot holds no expert"),
        ({"counts_NE": np.ones((4, 7), dtype=np.int64)}, "every expert must have a slot"),
        ({"counts_NE": with_one(COUNTS_NE, -3)}, "holds -3 at rank 0, expert 5"),
        ({"planned_S": SLOTS_S[:11]}, "ranks must divide the slots"),
        ({"planned_S": SLOTS_S[:0]}, "every expert must have a slot"),
        ({"planned_S": with_one(SLOTS_S, 6)}, "a slot holds no expert"),
        ({"planned_S": with_one(SLOTS_S, -1)}, "a slot holds no expert"),
        ({"planned_S": np.zeros(12, dtype=np.int16)}, "every expert must have a slot"),
        ({"planned_S": np.tile(SLOTS_S, 4)}, "no more slots than experts"),
        ({"node_size": 3}, "a node's ranks all ranks"),
        ({"node_size": 0}, "a node's ranks all ranks"),
        ({"home": 1}, "home slots must be E/N"),
        ({"home": -1}, "home slots must be E/N"),
        ({"rank": 4}, r"rank must be in 0\.\.N-1"),
        ({"rank": -1}, r"rank must be in 0\.\.N-1"),
    ],
)
def test_the_core_refuses_what_it_cannot_read(other: dict[str, Any], message: str) -> None:
    decide()
    with pytest.raises(ValueError, match=message):
        decide(**other)


def test_counts_are_read_from_rows_that_end_in_the_same_tags() -> None:
    rows = np.arange(12).reshape(3, 4)
    rows[:, 2:] = 7
    counts_NE = native.agreed_counts(rows, 2)
    assert counts_NE is not None and counts_NE.tolist() == rows[:, :2].tolist()
    for place in (2, 3):
        other = rows.copy()
        other[1, place] += 1
        assert native.agreed_counts(other, 2) is None
    for wrong, tags in ((rows[0], 2), (rows[:0], 2), (rows[:, :2], 2), (rows, 0)):
        with pytest.raises(ValueError, match=r"rows must be \[N, E \+ tags\]"):
            native.agreed_counts(wrong, tags)


LOADS_S, SHORT_S = np.full(12, 2), np.full(11, 2)
COLUMNS_NC = np.ones((4, 3), dtype=np.int64)
SUMS = np.ones(12, dtype=np.int64), np.ones(12, dtype=np.int64), *[np.ones(4, dtype=np.int64)] * 3
OF_TWO = make_costs().for_native(Geometry(2, 6, 3, 2))


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (native.rank_row, (COUNTS_NE, SLOTS_S, SHORT_S, 2, 0), "wrong size of loads"),
        (native.rank_row, (COUNTS_NE, SLOTS_S, LOADS_S, 2, 4), "rank must be"),
        (native.rank_columns, (COUNTS_NE, SLOTS_S, SHORT_S, 2, 0), "wrong size of loads"),
        (native.rank_columns, (COUNTS_NE, SLOTS_S, LOADS_S, 2, 4), "rank must be"),
        (native.totals, (COUNTS_NE, SLOTS_S, SHORT_S, 2), "wrong size of loads"),
        (native.rank_quotas, (SLOTS_S, SHORT_S, COLUMNS_NC, 6), "wrong size of the row"),
        (native.rank_quotas, (SLOTS_S, LOADS_S, COLUMNS_NC[:3], 6), "wrong size of the columns"),
        (native.rank_quotas, (SLOTS_S, LOADS_S, COLUMNS_NC, 5), "a slot holds no expert"),
        (native.greedy, (COUNTS_NE, SLOTS_S, 2, 0, OF_TWO), "another shape"),
        (native.layer_seconds, (COSTS, SUMS[0], SUMS[1][:8], *SUMS[2:]), "size of the slots"),
        (native.layer_seconds, (COSTS, *SUMS[:4], SUMS[4][:2]), "wrong size of the ranks"),
        (native.least_layer_seconds, (COSTS, np.ones((8, 6))), "wrong size of counts"),
        (native.change_seconds, (COSTS, SLOTS_S[:8], SLOTS_S), "size of the slots"),
        (native.change_seconds, (COSTS, SLOTS_S, SLOTS_S + 1), "a slot holds no expert"),
        (native.exposed, (COSTS, SLOTS_S[:11], 0.0), "size of the slots"),
        (native.exposed, (COSTS, SLOTS_S - 1, 0.0), "a slot holds no expert"),
    ],
)
def test_the_core_refuses_sizes_that_do_not_fit(call: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*arguments)


def test_the_core_refuses_costs_of_other_sizes() -> None:
    def carried(ranks: int) -> native.Carried:
        return native.Carried(1.0, 1.0, np.ones(ranks, dtype=np.int64))

    of_one = np.array([1]), *[np.ones(1)] * 4
    numbers = 1.0, 0.3, 4.0, *[1.0] * 2, False, *[1.0] * 2, *[0.0] * 5
    way = native.Way(4, 6, 3, 2, 0, (4, 1), (0,), 4), 0.0
    for points, ways, weights, grads, message in (
        ((*of_one[:2], np.ones(2), *of_one[3:]), [way], 4, 4, "wrong size of the GEMM curve"),
        ([np.ones(0)] * 5, [way], 4, 4, "the GEMM curve is empty"),
        (of_one, [], 4, 4, "no way to move experts"),
        (of_one, [way], 4, 2, "weights and gradients must be of as many ranks"),
        (of_one, [way], 2, 4, "weights and gradients must be of as many ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            native.CostModel(
                *points, *numbers, ways, *[0.0] * 3, 0, carried(weights), carried(grads), 1
            )
