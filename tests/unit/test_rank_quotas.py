"""One rank's part of a microbatch equals its definition, and the core refuses other input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
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
from megatron_laer.runtime.comm.collectives import routing_words
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
LOADS_S, COLUMNS_NC = np.full(12, 2), np.ones((4, 3), dtype=np.int64)
SUMS = *[np.ones(12, dtype=np.int64)] * 2, *[np.ones(4, dtype=np.int64)] * 3
COSTS, OF_TWO = (make_costs().for_native(Geometry(ranks, 6, 3, 2)) for ranks in (4, 2))
CALLS: dict[Any, tuple[Any, ...]] = {
    native.decide: ("adaptive", COSTS, None, COUNTS_NE, SLOTS_S, 2, 0, 0),
    native.rank_row: (COUNTS_NE, SLOTS_S, LOADS_S, 2, 0),
    native.rank_columns: (COUNTS_NE, SLOTS_S, LOADS_S, 2, 0),
    native.totals: (COUNTS_NE, SLOTS_S, LOADS_S, 2),
    native.rank_quotas: (SLOTS_S, LOADS_S, COLUMNS_NC, 6),
    native.greedy: (COUNTS_NE, SLOTS_S, 2, 0, COSTS),
    native.layer_seconds: (COSTS, *SUMS),
    native.least_layer_seconds: (COSTS, COUNTS_NE),
    native.change_seconds: (COSTS, SLOTS_S, SLOTS_S),
    native.exposed: (COSTS, SLOTS_S, 0.0),
}


def wrong(argument: Any) -> Iterator[Any]:
    """Yield values of an argument's type that do not fit the other arguments."""
    if isinstance(argument, np.ndarray):
        yield from (argument[:-1], argument[:0], argument[..., :-1])
    if argument is COUNTS_NE:
        yield from (COUNTS_NE[0], np.ones((4, 7), dtype=np.int64))
    elif argument is SLOTS_S:  # an expert that is none, and too many slots
        yield from (SLOTS_S + 1, np.tile(SLOTS_S, 4))
    elif argument is COSTS:
        yield OF_TWO
    elif isinstance(argument, int):
        yield from (-1, 5)
    elif isinstance(argument, str):
        yield "guess"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_core_refuses_each_argument_that_does_not_fit_the_others(call: Any) -> None:
    given = CALLS[call]
    call(*given)
    refused = [
        (*given[:at], other, *given[at + 1 :])
        for at, argument in enumerate(given)
        for other in wrong(argument)
    ]
    if call is native.decide:
        for at, array in ((3, COUNTS_NE - 4), (4, SLOTS_S * 0), (4, SLOTS_S - 1)):
            refused.append((*given[:at], array, *given[at + 1 :]))
    for arguments in refused:
        with pytest.raises(ValueError, match=r"must|wrong size|another shape|holds|no such mode"):
            call(*arguments)


def test_shares_of_counts_just_below_32_bits_are_exact() -> None:
    """Give a replica in the node of ranks 0 and 1 room for seven eighths of their tokens."""
    slots_S = ExpertLayout.from_slots(6, 1, 2, [1, 1, 0, 1, 1, 0]).slot_expert_S
    counts_NE = np.array([[2 * 10**9, 0]] * 2 + [[0, 0]] * 4)
    loads_S = np.array([0, 0, 35, 0, 0, 5]) * 10**8
    for rank in (0, 1):
        row_S = native.rank_row(counts_NE, slots_S, loads_S, 3, rank)
        assert row_S.tolist() == [0, 0, 175 * 10**7, 0, 0, 25 * 10**7]
    for rank, tokens in ((2, 175 * 10**7), (5, 25 * 10**7)):
        columns_NC = native.rank_columns(counts_NE, slots_S, loads_S, 3, rank)
        assert columns_NC.ravel().tolist() == [tokens, tokens, 0, 0, 0, 0]


TAGS = 2


def gathered(rng: np.random.Generator, num_experts: int) -> tuple[np.ndarray, int]:
    """Return the rows of three ranks' counts, words and two tags, and the number of words."""
    rows = []
    for _ in range(3):
        map_TE = torch.from_numpy(rng.random((50, num_experts)) < 0.5)
        rows.append([*map_TE.sum(dim=0).tolist(), *(words := routing_words(map_TE).tolist()), 7, 8])
    return np.array(rows), len(words)


@pytest.mark.parametrize(("num_experts", "words"), [(64, 16), (60, 15), (6, 3), (5, 5)])
def test_counts_are_read_from_rows_with_the_same_tags_whose_words_have_them(
    num_experts: int, words: int
) -> None:
    rng = np.random.default_rng(num_experts)
    rows, found = gathered(rng, num_experts)
    assert found == words
    counts_NE, wrong = native.agreed_counts(rows, words, TAGS)
    assert counts_NE is not None and counts_NE.tolist() == rows[:, :num_experts].tolist()
    assert wrong is None
    for place in (-2, -1):
        other = rows.copy()
        other[1, place] += 1
        assert native.agreed_counts(other, words, TAGS) == (None, None)
    for wrong_rows, parts, tags in (
        *((rows[0], words, 2), (rows[:0], words, 2), (rows, 0, 2), (rows, words, 0)),
        *((rows[:, : words + 2], words, 2), (rows, words + num_experts, 2)),
    ):
        with pytest.raises(ValueError, match=r"rows must be \[N, E \+ words \+ tags\]"):
            native.agreed_counts(wrong_rows, parts, tags)


# A token, and numbers of tokens that are lost first from a sum that overflows.
MOVED = (1, 2**32 - 1, *(2**bits for bits in range(8, 33, 4)))


@pytest.mark.parametrize("num_experts", [32, 60, 6, 5])
def test_no_tokens_move_between_two_experts_unseen(num_experts: int) -> None:
    """Try all pairs of experts, then 2,500 random ones with as many random numbers of tokens."""
    rng = np.random.default_rng(num_experts)
    rows, words = gathered(rng, num_experts)
    pairs = [*itertools.permutations(range(num_experts), 2)]
    moves = [(pair, tokens) for pair in pairs for tokens in MOVED]
    for pair in rng.choice(pairs, 2500).tolist():
        multiple = (1, 256, 65536)[rng.integers(3)]
        moves.append((pair, multiple * int(rng.integers(1, 2**16))))
    for (source, target), tokens in moves:
        moved = rows.copy()
        moved[rank := tokens % 3, [source, target]] += np.array([-tokens, tokens])
        first = min(source, target) * words // num_experts
        assert native.agreed_counts(moved, words, TAGS)[1] == (rank, first), (source, tokens)


def test_a_map_of_many_tokens_has_other_words_after_any_move() -> None:
    """Move 256 of 300 tokens between any two of 32 experts, in the map itself."""
    words_EW = [
        routing_words(torch.arange(32).expand(256, -1) == expert).tolist() for expert in range(32)
    ]
    assert len({(*words_W,) for words_W in words_EW}) == 32


@pytest.mark.parametrize(("widths", "links"), [((4,), ()), ((4, 1), ()), ((4, 3), (0,))])
def test_the_core_refuses_ways_without_a_hop_between_places(
    widths: tuple[int, ...], links: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="a hop follows each but the last"):
        native.Way(4, 6, 3, 2, 0, widths, links, 4)


def test_the_core_refuses_costs_of_other_sizes() -> None:
    def carried(ranks: int) -> native.Carried:
        return native.Carried(1.0, 1.0, np.ones(ranks, dtype=np.int64))

    of_one = np.array([1]), *[np.ones(1)] * 4
    numbers = 1.0, 0.3, 4.0, *[1.0] * 2, False, *[1.0] * 2, *[0.0] * 7
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
