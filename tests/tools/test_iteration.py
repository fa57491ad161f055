"""The recursion over ranks' clocks, against cases that are worked out by hand.

Legend: N ranks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from megatron_laer.life import Kind
from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.chunk import Following, LayerTimes, MoETimes, Pass
from megatron_laer.tools.simulator.iteration.chunk import run as run_parts
from megatron_laer.tools.simulator.iteration.clocks import (
    GRADIENTS,
    INTER,
    INTRA,
    KINDS,
    PARAMETERS,
    Clocks,
)
from megatron_laer.tools.simulator.iteration.iterate import Stages
from megatron_laer.tools.simulator.iteration.pipeline import in_flight, order, sweep
from megatron_laer.tools.simulator.iteration.rates import slowest_pace


def forward(*args, **settings):
    return Pass(*args, is_backward=False, **settings).parts()


def backward(*args, **settings):
    return Pass(*args, is_backward=True, **settings).parts()


OVERLAPPED = Schedule.of({Kind.SYNCHRONISED})
ALONE = Schedule.of({Kind.ALONE})
AFTER_GATE = Schedule.of({Kind.FRESH, Kind.SYNCHRONISED})
FOLLOWING = Schedule.of(())
EXACT = Schedule.of({Kind.FRESH})
BY_PARTS = Schedule.of({Kind.PARTS})


def layer(forward_N, backward_N=None, restore_s=None, reduce_s=None, **more):
    """Make a MoE layer: attention 2 and 4 seconds, an exchange of tokens 1 second."""
    of_moe = {"tokens_N": np.ones(len(forward_N)), "within_node": False, "gate_s": 0.0}
    of_moe |= {"change_s": None, "group": None, "tokens_link": INTER}
    of_moe |= {"directions": 1, "after_rerun_s": None}
    of_moe |= {key: more.pop(key) for key in list(more) if key in of_moe}
    of = MoETimes(
        forward_N=np.array(forward_N, float),
        backward_N=np.array(backward_N or forward_N, float),
        restore_s=restore_s,
        backward_restore_s=restore_s,
        reduce_s=reduce_s,
        **of_moe,
    )
    settings = {"again": False} | more
    return LayerTimes("layer", ({"attention": 2.0}, {"attention": 4.0}), of, **settings)


def spent(clocks):
    """Return seconds by kind of rank 0, after checking that kinds add up on every rank."""
    total_N = sum(clocks.spent[kind] for kind in KINDS)
    assert total_N == pytest.approx(clocks.now_N)
    return {kind: seconds_N[0] for kind, seconds_N in clocks.spent.items() if seconds_N.any()}


def ran(schedule, *layers, passes=(forward,), ranks=1, node_size=None, **of_clocks):
    """Return the clocks after these passes over a chunk of layers."""
    clocks = Clocks(ranks, node_size or ranks, **of_clocks)
    for run in passes:
        run_parts(run(clocks, [*layers], schedule))
    return clocks


def test_one_rank_does_one_thing_after_the_other():
    clocks = ran(ALONE, layer([10], [20]), passes=(forward, backward))
    assert clocks.now_N.tolist() == [2 + 1 + 10 + 1 + 1 + 20 + 1 + 4]
    assert spent(clocks) == {"attention": 6, "experts": 30, "tokens": 4}


def test_ranks_wait_for_the_late_one_at_the_combine():
    clocks = ran(ALONE, layer([10, 13]), ranks=2)
    assert clocks.now_N.tolist() == [17, 17]
    assert spent(clocks)["waiting"] == 3
    assert clocks.spent["waiting"].tolist() == [3, 0]


def test_tokens_within_nodes_let_only_the_node_wait_until_the_counts_meet():
    clocks = Clocks(4, 2)
    layers = [layer([1, 5, 2, 2], within_node=True), layer([1, 1, 1, 1], within_node=True)]
    run_parts(forward(clocks, layers[:1], ALONE))
    assert clocks.now_N.tolist() == [9, 9, 6, 6]
    run_parts(forward(clocks, layers[1:], ALONE))  # counts are gathered over all ranks
    assert clocks.now_N.tolist() == [14, 14, 14, 14]
    assert clocks.spent["waiting"].tolist() == [4, 0, 3, 3]


def test_counts_make_no_rank_of_another_group_wait():
    clocks = ran(ALONE, layer([1, 5, 2, 2], group=2), layer([1] * 4, group=2), ranks=4)
    assert clocks.now_N.tolist() == [14, 14, 11, 11]
    assert clocks.spent["waiting"].tolist() == [4, 0, 0, 0]


HIDDEN = layer([10], restore_s=3)
RESTORES = layer([10], restore_s=8)
REDUCES = layer([10], [20], reduce_s=9)
# A reduce can hide in the attention and in the next layer's combine, experts and dispatch.
WINDOW = 4 + 1 + 20 + 1


@pytest.mark.parametrize(
    ("run", "schedule", "layers", "kind", "exposed"),
    [
        # The second layer's restore has 10 + 1 + 2 + 1 seconds from one dispatch to the next.
        *(
            (forward, OVERLAPPED, [HIDDEN, layer([10], restore_s=s)], "restore", x)
            for s, x in ((14, 0), (15, 1), (20, 6))
        ),
        # The first restore begins with the chunk.
        (forward, OVERLAPPED, [RESTORES], "restore", 8 - (2 + 1)),
        (forward, ALONE, [RESTORES] * 2, "restore", 16),
        # A layout of after the gate is restored next to the dispatch.
        (forward, AFTER_GATE, [RESTORES] * 2, "restore", 2 * (8 - 1)),
        # Backward restores the layer before: only the last one has but the combine before it.
        (backward, OVERLAPPED, [layer([10], [20], restore_s=3)] * 2, "restore", 2),
        *(
            (backward, OVERLAPPED, [layer([10], [20]), layer([10], [20], reduce_s=s)], "reduce", e)
            for s, e in ((WINDOW, 0), (WINDOW + 5, 5))
        ),
        # The last gradients of a chunk are exposed but for its attention.
        (backward, OVERLAPPED, [REDUCES], "reduce", 9 - 4),
        (backward, ALONE, [REDUCES], "reduce", 9),
    ],
)
def test_exchanges_hide_behind_compute_as_the_schedule_allows(run, schedule, layers, kind, exposed):
    assert spent(ran(schedule, *layers, passes=(run,))).get(kind, 0) == exposed


@pytest.mark.parametrize(
    ("run", "schedule", "exposed"),
    [
        # Begins with the chunk: behind attention and dispatch, or a combine.
        (forward, OVERLAPPED, 20 - 3),
        (backward, OVERLAPPED, 20 - 1),
        # Begins after the dispatch before: behind experts and combine too.
        (forward, FOLLOWING, 20 - 3 - 11),
        (backward, FOLLOWING, 20 - 1 - 11),
        # The layout of a forward is known after its gate only.
        (forward, EXACT, 20 - 1),
        (backward, EXACT, 20 - 1 - 11),
    ],
)
def test_an_operations_first_restore_hides_behind_the_operation_before(run, schedule, exposed):
    first, next_one = replace(layer([10]), name="before"), layer([10], restore_s=20)
    clocks = Clocks(1, 1)
    following = Following(next_one, run is backward, same_microbatch=False)
    (fetched,) = run_parts(forward(clocks, [first], schedule, None, following))
    assert (fetched is None) == (schedule is OVERLAPPED or (run, schedule) == (forward, EXACT))
    run_parts(run(clocks, [next_one], schedule, fetched))
    assert spent(clocks)["restore"] == exposed


@pytest.mark.parametrize(
    ("before", "to_backward", "of_layer", "more", "fetched_s"),
    [
        (forward, True, {"change_s": 5}, {"same_microbatch": True}, 0),
        (forward, True, {}, {}, 0),  # the layout in force
        (forward, True, {"change_s": 5}, {}, 2 + 5 + 5),  # after those of its own gate
        (forward, True, {}, {"schedule": EXACT}, 3 + 20),  # perhaps all slots differ
        # A form of weights for each direction; a re-run has forward's.
        (forward, True, {"directions": 2}, {"same_microbatch": True}, 3 + 20),
        (forward, True, {"directions": 2, "again": True}, {"same_microbatch": True}, 0),
        (backward, False, {"directions": 2}, {"same_microbatch": True}, 1 + 20),
        (backward, True, {"directions": 2}, {"same_microbatch": True}, 0),
        (backward, True, {"directions": 2, "again": True}, {}, 14 + 1 + 20),
        # What stays for its backward is neither fetched nor handed on.
        (backward, True, {}, {"stays": True, "present": "another"}, 0),
        (backward, True, {"directions": 2}, {"stays": True, "present": "another"}, 1 + 20),
        (forward, False, {}, {"stays": True}, 3 + 20),
        (forward, False, {"directions": 2}, {"stays": True}, 0),
    ],
)
def test_a_layer_that_follows_itself_fetches_slots_that_differ_in_form_or_layout(
    before, to_backward, of_layer, more, fetched_s
):
    more = {"schedule": FOLLOWING, "present": "layer", "same_microbatch": False} | more
    present, same = (layer([10], restore_s=moved_s, **of_layer) for moved_s in (None, 20))
    present, schedule = replace(present, name=more.pop("present")), more.pop("schedule")
    following = Following(same, to_backward, **more)
    (found,) = run_parts(before(Clocks(1, 1), [present], schedule, None, following))
    assert found is not None and found.end_s == fetched_s


def test_what_runs_together_is_followed_by_the_next_operation_of_its_direction():
    run, method = SimpleNamespace(stages=2, synchronises=False), SimpleNamespace(schedule=BY_PARTS)
    stages = mock.Mock(spec=Stages, _run=run, _method=method)
    stages._layers = lambda place, _: [replace(layer([1]), name=str(place))]
    stages._order_of = partial(Stages._order_of, stages)
    of_last = order(1, 2, 2, 4, by_parts=True)
    found = Stages._following(stages, 1, of_last)
    for is_forward in (True, False):
        mine = [each for each in chain(*of_last) if each.is_forward == is_forward]
        assert mine[-1] not in found
        for before, after in pairwise(mine):
            of = found[before]
            assert (of.layer.name, of.is_backward) == (str(2 * after.chunk + 1), not is_forward)
    # While a forward through the last chunk runs, its backward is next.
    stay = [each for each in found if found[each].stays]
    for operations in of_last:
        of_last_chunk = len(operations) == 2 and operations[0].chunk == 1
        assert all((each in stay) == of_last_chunk for each in operations if each in found)


def test_after_a_re_run_backward_waits_for_its_own_form_behind_both_combines():
    moved = {"restore_s": 1, "directions": 2, "after_rerun_s": 5}
    clocks = ran(OVERLAPPED, layer([10], [20], again=True, **moved), passes=(backward,))
    assert spent(clocks)["restore"] == 5 - 2


def test_changed_slots_are_fetched_after_the_gate_and_waited_for():
    clocks = ran(OVERLAPPED, layer([10], restore_s=1, change_s=5, gate_s=0.5))
    parts = {"attention": 2, "gate": 0.5, "tokens": 2, "restore": 4, "experts": 10}
    assert spent(clocks) == parts


def test_a_restore_begins_when_the_last_rank_has_begun_it():
    clocks = Clocks(2, 2)
    clocks.now_N = np.array([0.0, 6.0])
    run_parts(forward(clocks, [layer([1, 1], restore_s=10)], OVERLAPPED))
    # At 6; attention and dispatch end at 9, since counts wait for the late rank.
    assert clocks.spent["restore"].tolist() == [7, 7]


class NotingClocks(Clocks):
    """Clocks that keep each stream's exchanges as they were when they began."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.begun = {PARAMETERS: [], GRADIENTS: []}

    def exchange(self, stream, seconds, link):
        flight = super().exchange(stream, seconds, link)
        self.begun[stream].append(replace(flight))
        return flight


def test_one_communicator_has_gradients_wait_for_parameters():
    """Layer 1's restore and layer 2's gradients share the link, or take turns."""
    layers = [layer([1], [1], restore_s=40), layer([1], [1], restore_s=1, reduce_s=40)]
    for one_stream in (False, True):
        clocks = NotingClocks(1, 1, one_stream=one_stream)
        run_parts(backward(clocks, [*layers], OVERLAPPED))
        restored_s = max(flight.end_s for flight in clocks.begun[PARAMETERS])
        (reduced,) = clocks.begun[GRADIENTS]
        assert (reduced.begin_s >= restored_s) == one_stream and reduced.end_s > 80


def test_exchanges_and_tokens_over_one_class_of_links_share_it():
    """While both are under way each is half as fast; other links have their own bytes."""
    shared = layer([10], restore_s=4, tokens_link=INTRA)
    apart = layer([10], restore_s=4)
    # The restore begins before attention, of 2, and has 2 left when the tokens, of 1, begin.
    assert spent(ran(OVERLAPPED, shared))["tokens"] == 2 + 1
    assert spent(ran(OVERLAPPED, shared))["restore"] == 5 - (2 + 2)
    assert spent(ran(OVERLAPPED, apart))["tokens"] == 2
    assert spent(ran(OVERLAPPED, apart))["restore"] == 4 - (2 + 1)


def test_recompute_runs_forward_again_with_its_tokens_and_restores_once():
    clocks = ran(OVERLAPPED, layer([10], [20], restore_s=1, again=True), passes=(backward,))
    again = 2 + 1 + 10 + 1
    assert clocks.now_N.tolist() == [again + 1 + 20 + 1 + 4]
    assert "restore" not in spent(clocks)  # hidden by the attention that runs again


def test_an_exchange_next_to_compute_slows_both():
    clocks = ran(OVERLAPPED, layer([10]), layer([10], restore_s=4), contention=0.5)
    assert spent(clocks)["experts"] == 10 + 0.5 * 4 + 10
    assert spent(ran(OVERLAPPED, RESTORES, stretch=2.0))["restore"] == 16 - (2 + 1)


def test_compute_has_the_pace_of_the_slowest_card():
    paces = [slowest_pace(ranks) for ranks in (1, 8, 128, 1024)]
    assert paces[0] == 1.0 and paces == sorted(paces)
    # The largest of 8 and of 128 normal draws is 1.42 and 2.6 deviations above the mean.
    assert np.diff(paces[1:3])[0] == pytest.approx(0.015 * (2.6 - 1.42), rel=0.05)
    slow, fast = Clocks(1, 1, pace=1.02), Clocks(1, 1)
    for clocks in (slow, fast):
        clocks.work("experts", 1.0)
        clocks.work("tokens", 1.0)
    assert slow.now_N - fast.now_N == pytest.approx(0.02)


def pipeline(stages, chunks, microbatches, forward_s=1.0, backward_s=2.0, send_s=0.0, **more):
    clocks = [Clocks(1, 1) for _ in range(stages)]
    orders = [order(stage, stages, chunks, microbatches, **more) for stage in range(stages)]

    def run(stage, operations):
        for each in operations:
            clocks[stage].work("dense", forward_s if each.is_forward else backward_s)

    sweep(clocks, orders, chunks, run, send_s)
    return max(float(of.now_N[0]) for of in clocks), orders


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 8), (4, 2), (8, 32)])
def test_1f1b_has_the_bubble_of_the_formula(stages, microbatches):
    assert pipeline(stages, 1, microbatches)[0] == (microbatches + stages - 1) * 3
    for stage in range(stages):
        assert in_flight(stage, stages, 1, microbatches) == min(microbatches, stages - stage)


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 4, 8)])
def test_interleaved_chunks_divide_the_bubble(stages, chunks, microbatches):
    seconds, orders = pipeline(stages, chunks, microbatches, 1 / chunks, 2 / chunks)
    assert seconds == pytest.approx(3 * microbatches + 3 * (stages - 1) / chunks)
    for of in orders:
        passes = {(op.is_forward, op.chunk, op.microbatch) for (op,) in of}
        assert len(passes) == len(of) == 2 * chunks * microbatches


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(1, 1, 1), (1, 1, 4), (4, 2, 8)])
def test_passes_that_run_together_are_of_two_microbatches(stages, chunks, microbatches):
    """One forward more warms up, so that one more pass's activations are held."""
    sizes = stages, chunks, microbatches
    _, orders = pipeline(*sizes, by_parts=True)
    assert in_flight(0, 8, 4, 10**18, by_parts=True) == 40  # without a list of them
    for stage, (of, alone) in enumerate(zip(orders, pipeline(*sizes)[1], strict=True)):
        pairs = [operations for operations in of if len(operations) == 2]
        assert (len(pairs) > 0) == (microbatches > 1)
        assert all(one.microbatch != other.microbatch for one, other in pairs)
        assert sorted(map(str, chain(*of))) == sorted(map(str, chain(*alone)))
        for each, by_parts in ((alone, False), (of, True)):
            held = accumulate(1 if one.is_forward else -1 for one in chain(*each))
            assert in_flight(stage, *sizes, by_parts=by_parts) == max(held)


def together_ran(forwards, backwards, **of_clocks):
    clocks = Clocks(1, 1, **of_clocks)
    in_turn = bool(forwards and backwards)
    run_parts(
        backward(clocks, backwards, BY_PARTS, in_turn=in_turn),
        forward(clocks, forwards, BY_PARTS, in_turn=in_turn),
    )
    return spent(clocks)


def test_tokens_of_one_microbatch_travel_during_the_compute_of_another():
    one, slow = (layer([10], [20], tokens_N=np.array([seconds])) for seconds in (1.0, 12.0))
    assert together_ran([one], []) == {"attention": 2, "experts": 10, "tokens": 2}
    # Backward's dispatch hides behind half of the experts: their weight gradients.
    assert together_ran([], [one]) == {"attention": 4, "experts": 20, "tokens": 1}
    assert together_ran([one], [one]) == {"attention": 6, "experts": 30}
    # Beside attention; weight gradients; the other's experts, and its dispatch; attention again.
    exposed = (12 - 2) + (12 - 10) + (12 - 10) + (12 - 4)
    assert together_ran([slow], [slow])["tokens"] == exposed


@pytest.mark.parametrize(
    ("forwards", "backwards", "kind", "exposed"),
    [
        # Begins with the pass: behind attention and all experts of backward.
        ([layer([10], restore_s=30)], [layer([10], [20])], "restore", 30 - (2 + 20)),
        ([], [layer([10], [20], restore_s=20)], "restore", 20 - 1),
        # The next layer's begins when this one's tokens or gradients have arrived.
        ([layer([10]), layer([10], restore_s=20)], [], "restore", 20 - (10 + 1 + 2 + 1)),
        ([], [layer([10], [20], restore_s=60), layer([10], [20])], "restore", 60 - (20 + 4 + 1)),
        # Gradients leave with the tokens' own, and hide behind attention alone.
        ([], [layer([10], [20], reduce_s=9)], "reduce", 9 - 4),
    ],
)
def test_weights_and_gradients_hide_between_the_parts_of_a_layer(
    forwards, backwards, kind, exposed
):
    assert together_ran(forwards, backwards)[kind] == exposed


def test_hidden_tokens_slow_compute_and_share_their_links_with_weights():
    one = layer([10], [20])
    slowed = together_ran([one], [one], contention=0.3)
    assert slowed["experts"] == pytest.approx(30 + 0.3 * 20 / 12 * (1 + 1))
    apart, shared = (
        [layer([10], tokens_link=link), layer([10], restore_s=20, tokens_link=link)]
        for link in (INTER, INTRA)
    )
    # The restore is under way during a combine and a dispatch.
    assert (together_ran(apart, [])["tokens"], together_ran(shared, [])["tokens"]) == (4, 4 + 2)


def test_a_stage_waits_for_what_is_sent():
    seconds, _ = pipeline(2, 1, 1, send_s=0.25)
    assert seconds == 3 + 3 + 2 * 0.25
