"""The table of a layer's life: each cell is some pass's, and every pass ends as it should."""

from __future__ import annotations

import itertools

import pytest

from megatron_laer.life import IMPOSSIBLE, LIFE, Action, Cell, Event, Kind, Kinds, column

# Kinds that imply others: payloads and empty slots are homes', and a first pass makes no graph.
_NEEDED = {
    Kind.EMPTY: {Kind.HOMES},
    Kind.DIRECTIONS: {Kind.HOMES},
    Kind.FIRST: {Kind.FROZEN},
}


def is_possible(kinds: Kinds) -> bool:
    implied = all(_NEEDED.get(kind, set()) <= kinds for kind in kinds)
    reached = Kind.EVALUATION not in kinds or not kinds & {Kind.FIRST, Kind.RERUN}
    return implied and reached and not any(pair <= kinds for pair in IMPOSSIBLE)


def passes() -> list[Kinds]:
    sets = itertools.chain.from_iterable(
        itertools.combinations(Kind, size) for size in range(len(Kind) + 1)
    )
    return [kinds for kinds in map(frozenset, sets) if is_possible(kinds)]


PASSES = passes()


def test_every_cell_is_some_passs() -> None:
    for event, rows in LIFE.items():
        taken = set()
        for kinds in PASSES:
            taken.add(next((needed for needed in rows if needed <= kinds), None))
        assert {*rows} - taken == set(), event
    with pytest.raises(AssertionError, match="no pass is"):
        column(IMPOSSIBLE[0])


def backward_kinds(kinds: Kinds) -> Kinds:
    """Return the kinds of the forward whose backward follows: a checkpoint's re-run."""
    if Kind.FIRST not in kinds:
        return kinds
    return kinds - {Kind.FIRST, Kind.FROZEN} | {Kind.RERUN}


class Weights:
    """Weights of both directions on one rank, whose memory is counted."""

    def __init__(self, kinds: Kinds) -> None:
        self.ways = ("forward", "backward") if Kind.DIRECTIONS in kinds else ("both",)
        self.held: set[str] = set()

    def do(self, cell: Cell) -> None:
        forward, backward = self.ways[0], self.ways[-1]
        for action in cell:
            if action is Action.RESTORE:
                self.held.add(forward)
            elif action is Action.RESTORE_BACKWARD:
                self.held.add(backward)
            elif action is Action.FREE:
                self.held.discard(forward)
            elif action is Action.FREE_BACKWARD:
                self.held.discard(backward)


def test_weights_are_there_when_they_are_used_and_freed_after() -> None:
    for kinds in PASSES:
        weights = Weights(kinds)
        life = column(kinds)
        weights.do(life[Event.DECIDED])
        weights.held.add(weights.ways[0])  # the first product restores what is not there
        weights.do(life[Event.AFTER_EXPERTS])
        keeps = {Kind.STEP, Kind.RERUN} & kinds
        assert keeps or not weights.held, kinds
        if Kind.EVALUATION in kinds:
            assert not life[Event.NEXT_IN_BACKWARD]
            continue
        weights.do(life[Event.NEXT_IN_BACKWARD])
        if Kind.FIRST in kinds:
            assert weights.ways[0] in weights.held, "what the re-run multiplies by"
            life = column(backward_kinds(kinds))
            weights.do(life[Event.AFTER_EXPERTS])
        assert weights.ways[-1] in weights.held, "what backward multiplies by"
        weights.do(life[Event.OUTPUT_GRAD])
        weights.do(life[Event.INPUT_GRAD])
        assert not weights.held or Kind.STEP in kinds, kinds
        weights.do(life[Event.RELEASED])
        assert bool(weights.held) == (Kind.STEP in kinds)


def test_gradients_leave_once_after_the_tokens_and_are_waited_for_after_that() -> None:
    leaves = {Action.SEND, Action.SUM}
    for kinds in map(backward_kinds, PASSES):
        if kinds & {Kind.FROZEN, Kind.EMPTY}:
            continue
        life = column(kinds)
        # Nothing starts the reduce early.
        left = [event for event, cell in life.items() if leaves & {*cell}]
        assert left == [Event.DISPATCH_GRAD], kinds
        assert life[Event.WEIGHT_GRADS] == ((Action.DELAY,) if Kind.DELAYED in kinds else ()), kinds
        assert Action.JOIN_WAIT in life[Event.GATE], kinds
        assert Action.FINISH in life[Event.WAIT], kinds


def test_a_wait_is_joined_or_dropped_at_the_gate() -> None:
    for kinds in PASSES:
        joins = Kind.FROZEN not in kinds and (Kind.PARTS in kinds or Kind.EMPTY not in kinds)
        assert column(kinds)[Event.GATE] == ((Action.JOIN_WAIT,) if joins else ()), kinds


def test_backward_fetches_the_layer_before_when_its_own_gradients_have_arrived() -> None:
    for kinds in map(backward_kinds, PASSES):
        life = column(kinds)
        events = (Event.OUTPUT_GRAD, Event.INPUT_GRAD)
        fetched = [event for event in events if Action.FETCH in life[event]]
        is_ahead = not kinds & {Kind.ALONE, Kind.STEP}
        assert fetched == ([Event.OUTPUT_GRAD] if is_ahead else []), kinds


def test_only_what_was_started_is_awaited_and_nothing_runs_where_the_device_is_synchronised() -> (
    None
):
    for kinds in PASSES:
        life = column(kinds)
        assert not {Kind.PARTS, Kind.EMPTY} <= kinds or Action.FINISH not in life[Event.WAIT]
        follows = not kinds & {Kind.ALONE, Kind.SYNCHRONISED}
        assert (Action.FETCH in life[Event.LAST_LAYER]) == follows, kinds
