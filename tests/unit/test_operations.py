"""The order of a step's operations is that of the last complete step with as many microbatches."""

from __future__ import annotations

from collections import deque
from unittest import mock

import pytest

from megatron_laer.life import Kind, column
from megatron_laer.plugin import steps
from megatron_laer.runtime.operations import Operation, OperationOrder
from megatron_laer.runtime.scheduler import Scheduler

ONE_BY_ONE = [(chunk, number) for number in range(2) for chunk in range(2)]


def run(
    order: OperationOrder, places: list[tuple[int, int]], num_microbatches: int | None = 2
) -> list[Operation | None]:
    """Run forward and backward of each chunk and number in turn; return the expected operations."""
    order.begin_step(num_microbatches, 2)
    expected = [order.following(is_forward=True)]
    for chunk, _ in places:
        forward = order.begin_forward(chunk)
        expected.append(order.following(is_forward=True))
        if forward is not None:
            order.begin_backward(forward)
            expected.append(order.following(is_forward=False))
    order.end_step()
    return expected


def operations(places: list[tuple[int, int]]) -> list[Operation | None]:
    return [Operation(forward, *place) for place in places for forward in (True, False)]


def test_a_step_is_expected_to_be_as_the_one_before() -> None:
    order = OperationOrder()
    assert run(order, ONE_BY_ONE) == [None] * 9
    assert run(order, ONE_BY_ONE) == [*operations(ONE_BY_ONE), None]
    assert order.following(is_forward=True) is None, "between steps nothing follows"


def test_what_runs_together_is_followed_by_operations_of_its_direction() -> None:
    order, places = OperationOrder(by_direction=True), [*ONE_BY_ONE[1:], None]
    assert run(order, ONE_BY_ONE) == [None] * 9
    expected = [at and Operation(forward, *at) for at in places for forward in (True, False)]
    assert run(order, ONE_BY_ONE) == [Operation(True, 0, 0), *expected]
    assert order.begin_forward(0) is None, "between steps"
    swapped = [ONE_BY_ONE[1], ONE_BY_ONE[0], *ONE_BY_ONE[2:]]
    assert run(order, swapped) == [Operation(True, 0, 0)] + [None] * 8, "of neither direction"


def test_numbers_of_microbatches_have_orders_of_their_own() -> None:
    order = OperationOrder()
    run(order, ONE_BY_ONE)
    assert set(run(order, ONE_BY_ONE[:2], 1)) == {None}
    assert run(order, ONE_BY_ONE)[0] == Operation(True, 0, 0)
    assert set(run(order, ONE_BY_ONE, None)) == {None}


def test_after_another_operation_than_the_expected_one_none_is_expected() -> None:
    order = OperationOrder()
    run(order, ONE_BY_ONE)
    swapped = [ONE_BY_ONE[0], ONE_BY_ONE[2], ONE_BY_ONE[1], ONE_BY_ONE[3]]
    assert run(order, swapped) == [*operations(ONE_BY_ONE[:1]), Operation(True, 1, 0)] + [None] * 6
    assert run(order, swapped) == [*operations(swapped), None]


@pytest.mark.parametrize("places", [ONE_BY_ONE[:3], ONE_BY_ONE * 2], ids=["cut short", "repeated"])
def test_of_a_step_that_is_cut_short_or_repeated_no_more_is_learned(
    places: list[tuple[int, int]],
) -> None:
    """Megatron's rerun state machine repeats passes; nothing may be fetched for the optimizer."""
    order = OperationOrder()
    run(order, places)
    complete = len(places) >= 4
    expected = run(order, ONE_BY_ONE)
    assert expected == ([*operations(ONE_BY_ONE), None] if complete else [None] * 9)


@pytest.mark.parametrize(
    ("number", "gathers", "fetches"), [(0, True, False), (0, False, True), (1, True, True)]
)
def test_a_chunks_first_weights_are_fetched_once_megatron_has_gathered_them(
    number: int, gathers: bool, fetches: bool
) -> None:
    scheduler = Scheduler(frozenset(), mock.MagicMock(), mock.Mock())
    chunk = mock.Mock(layers=[mock.Mock()], blocks=[], gathers_weights=lambda: gathers)
    scheduler.attach([chunk])
    assert (scheduler._first_of(Operation(True, 0, number)) is not None) == fetches


def test_a_backward_begins_at_the_last_layer_of_its_forward_once_that_is_there() -> None:
    scheduler = Scheduler(frozenset((Kind.PARTS,)), mock.MagicMock(), mock.Mock())
    chunk = mock.Mock(layers=[mock.MagicMock(), mock.MagicMock()], blocks=[])
    backward = Operation(False, 0, 0)
    scheduler.attach([chunk])
    scheduler.begin_step(1)
    assert scheduler._first_of(backward) is None
    scheduler.begin_forward(chunk.module)
    for layer, is_last in zip(chunk.layers, (False, True), strict=True):
        restored = scheduler.enter(layer, training=True)
        assert scheduler._first_of(backward) is (restored if is_last else None)


@pytest.mark.parametrize("kinds", [(), (Kind.FRESH,)], ids=["prepared", "decided"])
def test_gathered_parameters_are_awaited_before_a_restore_sends_them(
    kinds: tuple[Kind, ...],
) -> None:
    done: list[str] = []

    def fetch(following: object, *, starts: bool = True) -> None:
        done.extend(["restore"] if following is not None and starts else [])

    layers = [mock.MagicMock(), mock.MagicMock()]
    for layer in layers:
        restored = layer.experts_of_pass.return_value
        restored.life = column(frozenset(kinds))
        restored.weights.start_restore = lambda: done.append("restore")
        restored.weights.fetch = fetch
    chunk = mock.Mock(layers=layers, blocks=[], await_weights=lambda _: done.append("wait"))
    scheduler = Scheduler(frozenset(kinds), mock.MagicMock(), mock.Mock())
    scheduler.attach([chunk])
    scheduler.begin_step(1)
    scheduler.begin_forward(chunk.module)
    for layer in layers:
        before = [*done]
        scheduler.decided(scheduler.enter(layer, training=True))
        scheduler.tokens_arrived(layer, training=True)
    assert len(before) < len(done) and done == ["wait", "restore"] * (len(done) // 2)


def test_weight_gradients_that_a_broken_step_delayed_are_not_computed_in_the_next() -> None:
    scheduler = Scheduler(frozenset((Kind.PARTS,)), mock.MagicMock(), mock.Mock())
    layer = mock.Mock(delayed=deque([mock.Mock()]))
    scheduler.attach([mock.Mock(layers=[layer], blocks=[])])
    scheduler.begin_step(1)
    assert not layer.delayed


@pytest.mark.parametrize(
    ("aligned", "with_optimizer", "skips"),
    [(False, False, False), (True, False, True), (False, True, True)],
)
def test_weights_are_awaited_as_megatrons_own_hook_does(
    aligned: bool, with_optimizer: bool, skips: bool
) -> None:
    """Megatron's hook dispatches the next bucket's gather, unless that is done elsewhere."""
    trained, frozen = (mock.Mock(requires_grad=trains) for trains in (True, False))
    wrapped = mock.Mock(
        ddp_config=mock.Mock(use_megatron_fsdp=False, align_param_gather=aligned),
        overlap_param_gather_with_optimizer_step=with_optimizer,
        remove_forward_pre_hook_handles={"module": mock.Mock()},
        param_to_bucket_group={trained: (bucket := mock.Mock())},
    )
    steps._await_weights(wrapped, [trained, frozen])
    bucket.finish_param_sync.assert_called_once_with(skip_next_bucket_dispatch=skips)
