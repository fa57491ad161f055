"""Restored experts go through their states in order, and free their memory in time or keep it.

Over 400 lines: one life of weights and gradients, told by one set of small experts.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from megatron_laer.life import Kind
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.comm.streams import make_comm_stream
from megatron_laer.runtime.layer_state import check_main_grads
from megatron_laer.runtime.weights import main_grads
from megatron_laer.runtime.weights.autograd import placeholder
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.share import Share
from megatron_laer.runtime.weights.slots import ExchangeStreams
from megatron_laer.telemetry.activities import Activity
from megatron_laer.telemetry.activities import Kind as Activities
from tests.placed import placed
from tests.unit.test_layout_index import one_rank

CPU = torch.device("cpu")
ROWS = (8, 3)


@pytest.fixture
def streams() -> Iterator[ExchangeStreams]:
    made = ExchangeStreams(
        one_rank(),
        parameters=make_comm_stream("parameters", CPU, overlaps=True),
        gradients=make_comm_stream("gradients", CPU, overlaps=True),
    )
    yield made
    made.close()


def restored_experts(
    streams: ExchangeStreams,
    *,
    trained: tuple[bool, bool] = (True, True),
    values: tuple[float, float] | None = None,
    kind_of_share: type[Share] = Share,
    kinds: tuple[Kind, ...] = (),
    delayed: deque[Callable[[], None]] | None = None,
) -> RestoredExperts:
    """Make two experts of 8 × 3 and 3 × 8; trained matrices have main gradients."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(2, *shape, generator=generator) for shape in ((8, 3), (3, 8))]
    if values is not None:
        matrices = [matrix.fill_(value) for matrix, value in zip(matrices, values, strict=True)]
    parameters = tuple(
        torch.nn.Parameter(matrix, requires_grad=is_trained)
        for matrix, is_trained in zip(matrices, trained, strict=True)
    )
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    index = layout_index(placed(ExpertLayout.static(1, 2, 2)), CPU)
    share = kind_of_share.of_slices(parameters, ROWS)
    return RestoredExperts("layer 1", share, index, streams, frozenset(kinds), delayed)


class Scaled(torch.autograd.Function):
    """Product with the sum of a matrix, which forward and backward both ask for."""

    @staticmethod
    def forward(ctx, tensor, placeholder, restored, position):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tensor)
        ctx.restored, ctx.position = restored, position
        return tensor * restored.weights.matrix(position).sum()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (tensor,) = ctx.saved_tensors
        tensor_needs, weight_needs = ctx.needs_input_grad[:2]
        grad_tensor = (
            grad * ctx.restored.backward_weights.matrix(ctx.position, "backward").sum()
            if tensor_needs
            else None
        )
        if not weight_needs:
            return grad_tensor, None, None, None
        weight_grad = (grad * tensor).sum()
        grad_CRK = ctx.restored.weight_grads(ctx.position, lambda out: out.fill_(weight_grad))
        return grad_tensor, grad_CRK, None, None


def compute(
    restored: RestoredExperts,
    tokens: torch.Tensor,
    probs: torch.Tensor,
    *,
    reruns: bool = False,
) -> torch.Tensor:
    """Compute as the layer does: gate, dispatch, experts."""
    return experts(restored, restored.dispatch(restored.gate(tokens, reruns=reruns)), probs)


def experts(restored: RestoredExperts, tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Compute as the module does: first matrix, probabilities, second matrix."""
    (tokens, probs), (first, second) = restored.before_compute(tokens, probs)
    hidden = Scaled.apply(tokens, first, restored, 0) * probs
    output = Scaled.apply(hidden, second, restored, 1)
    return restored.after_compute(output)


def is_over(restored: RestoredExperts) -> bool:
    """Return whether neither weights nor gradients of a pass are left."""
    grads = restored.grads
    return not (restored.weights.are_here or grads.are_complete or grads.are_leaving)


def ones(*, needs_grad: bool) -> torch.Tensor:
    return torch.ones(4, requires_grad=needs_grad)


def test_a_reruns_weights_are_in_memory_until_its_backward(streams: ExchangeStreams) -> None:
    restored = restored_experts(streams)
    assert not restored.weights.are_here
    restored.weights.start_restore()
    assert restored.weights.are_here
    output = compute(restored, ones(needs_grad=True), ones(needs_grad=True), reruns=True)
    assert streams.weights.in_use == 1
    assert restored.weights.are_here
    output.sum().backward()
    assert is_over(restored)
    assert streams.weights.in_use == streams.grads.in_use == 0
    count = streams.exchange.count
    assert (count.restores, count.reduces) == (1, 1)


@pytest.mark.parametrize(
    ("first", "second", "tokens_need", "probs_need"),
    [needs for needs in itertools.product((False, True), repeat=4) if any(needs)],
)
@pytest.mark.parametrize("waits", ["at once", "after the layer before"])
def test_whatever_needs_gradients_the_weights_are_freed_and_only_trained_ones_get_any(
    streams: ExchangeStreams,
    first: bool,
    second: bool,
    tokens_need: bool,
    probs_need: bool,
    waits: str,
) -> None:
    restored = restored_experts(streams, trained=(first, second))
    hidden = ones(needs_grad=tokens_need)
    if waits == "after the layer before":
        restored.make_wait()
    output = compute(restored, hidden, ones(needs_grad=probs_need))
    assert streams.weights.in_use == 0
    output.sum().backward()
    assert streams.weights.in_use == streams.grads.in_use == 0
    assert is_over(restored)
    count = streams.exchange.count
    assert (count.restores, count.backwards, count.reduces) == (2, 1, int(first or second))
    for parameter, is_trained in zip(restored.share.parameters, (first, second), strict=True):
        assert hasattr(parameter, "grad_added_to_main_grad") == is_trained
        assert not is_trained or parameter.main_grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("slots", [[0, 1], [1, 0]], ids=["one layout", "two layouts"])
def test_passes_through_one_layer_hand_on_its_weights(
    streams: ExchangeStreams, slots: list[int]
) -> None:
    first = restored_experts(streams)
    index = first.index
    if slots != [0, 1]:
        index = layout_index(placed(ExpertLayout.from_slots(1, 2, 2, slots)), CPU)
    second = RestoredExperts("layer 1", first.share, index, streams)
    first.weights.hand_on(second.weights)
    second.follow = first.first_in_backward
    middle = compute(first, ones(needs_grad=True), ones(needs_grad=True))
    assert not first.weights.are_here
    assert second.weights.are_here
    assert streams.weights.in_use == 1
    output = compute(second, middle, ones(needs_grad=True))
    assert streams.weights.in_use == 0
    output.sum().backward()
    assert is_over(first) and is_over(second)
    assert streams.weights.in_use == streams.grads.in_use == 0
    count = streams.exchange.count
    assert (count.restores, count.reduces) == (2, 2)
    assert count.changes == (0 if slots == [0, 1] else 2)
    # Both passes' gradients: d/dw of the sum of four times (product of the matrices' sums) ** 2.
    one, other = first.share.parameters
    expected = 4 * 2 * one.sum() * other.sum() ** 2
    assert torch.allclose(one.main_grad, expected.expand_as(one))  # type: ignore[attr-defined]


def test_memory_is_lent_again_only_when_the_restore_into_it_is_over(
    streams: ExchangeStreams,
) -> None:
    restored, goes_on = restored_experts(streams), threading.Event()
    streams.parameters.submit(lambda: torch.tensor(goes_on.wait()), Activity(Activities.RESTORE))
    restored.weights.start_restore()
    threading.Timer(0.2, goes_on.set).start()
    restored.after_compute(ones(needs_grad=False))  # its experts are still on their way
    assert streams.weights.in_use == 0
    assert not restored.weights.are_here


def test_a_reduce_waits_for_the_tokens_gradients(streams: ExchangeStreams) -> None:
    restored = restored_experts(streams)
    restored.make_wait()
    seen: list[tuple[bool, bool]] = []

    def look(_: torch.Tensor) -> None:
        seen.append((restored.grads.are_complete, restored.grads.are_leaving))

    hidden = ones(needs_grad=True) * 2
    hidden.register_hook(look)
    tokens = restored.dispatch(restored.gate(hidden))
    tokens.register_hook(look)
    experts(restored, tokens * 1, ones(needs_grad=True)).sum().backward()
    assert seen == [(True, False), (False, True)]
    assert is_over(restored)


def test_delayed_gradients_of_two_passes_are_computed_oldest_first(
    streams: ExchangeStreams,
) -> None:
    delayed: deque[Callable[[], None]] = deque()
    kinds = frozenset((Kind.PARTS, Kind.DELAYED))
    first = restored_experts(streams, kinds=(*kinds,), delayed=delayed)
    second = RestoredExperts("layer 1", first.share, first.index, streams, kinds, delayed)
    dispatched = [
        restored.dispatch(restored.gate(ones(needs_grad=True))) for restored in (first, second)
    ]
    for restored, tokens in zip((first, second), dispatched, strict=True):
        part = tokens.detach().requires_grad_()
        experts(restored, part, ones(needs_grad=True)).sum().backward()
    for restored, tokens in zip((first, second), dispatched, strict=True):
        assert is_over(restored)
        delayed.popleft()()
        assert restored.grads.are_complete
        tokens.sum().backward()
        assert is_over(restored)
        assert streams.grads.in_use == (1 if restored is first else 0)


def test_lent_memory_is_counted_in_bytes_and_serves_training_after_an_evaluation() -> None:
    pool, kind = BufferPool(), ((3, 5), torch.bfloat16, CPU)
    with torch.inference_mode():
        lent = pool.take(*kind)
    pool.put_back(lent)
    assert pool.take(*kind) is lent and not lent.is_inference()
    assert (pool.in_use, pool.num_bytes) == (1, 30)


def test_placeholders_fill_no_memory_but_once_also_where_an_evaluation_comes_first() -> None:
    like = torch.zeros(2, dtype=torch.float64)  # a dtype that no other test has
    with torch.inference_mode():
        first = placeholder(like, (3, 4))
    second = placeholder(like, (5,)).requires_grad_()
    assert first.shape == (3, 4) and second.shape == (5,)
    assert first.data_ptr() == second.data_ptr()
    (second * 2).sum().backward()
    assert torch.equal(second.grad, torch.full((5,), 2.0, dtype=torch.float64))  # type: ignore[arg-type]


def test_main_gradients_have_received_the_sums_when_autograd_is_told(
    streams: ExchangeStreams,
) -> None:
    restored = restored_experts(streams)
    parameter = restored.share.parameters[0]
    seen: list[torch.Tensor] = []
    node = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_prehook(lambda _: seen.append(parameter.main_grad.clone()))
    for _ in range(2):
        compute(restored, ones(needs_grad=True), ones(needs_grad=True)).sum().backward()
    assert parameter.grad_added_to_main_grad
    assert not torch.equal(seen[0], torch.zeros_like(seen[0]))
    assert torch.equal(seen[1], 2 * seen[0]) and torch.equal(seen[1], parameter.main_grad)


def test_hooks_of_parameters_wait_for_the_stream_of_the_sums(streams: ExchangeStreams) -> None:
    """Autograd runs them on another stream than the one that has waited for the reduce."""
    restored = restored_experts(streams)
    parameters = restored.share.parameters
    waited: list[tuple[object, bool]] = []
    of_hooks = mock.Mock(
        wait_stream=lambda of: waited.append((of, bool(parameters[0].main_grad.any())))  # type: ignore[attr-defined]
    )
    main_grads.note_hook_stream(parameters, of_hooks)
    with mock.patch.object(torch.cuda, "current_stream", return_value="of the sums"):
        compute(restored, ones(needs_grad=True), ones(needs_grad=True)).sum().backward()
    assert waited == [("of the sums", True)]


def test_gradients_that_leave_too_early_or_too_late_are_named(streams: ExchangeStreams) -> None:
    grads = restored_experts(streams).grads
    with pytest.raises(AssertionError, match="layer 1: no reduce is under way"):
        grads.finish_reduce()
    for position in (0, 1):
        with pytest.raises(AssertionError, match="layer 1: tokens' gradients arrived before"):
            grads.let_go(sums=False)
        grads.new(position)
    assert grads.are_complete
    with pytest.raises(AssertionError, match="layer 1: the last pass's gradients have not left"):
        grads.new(0)


def test_a_pass_without_replicas_leaves_no_wait_behind(streams: ExchangeStreams) -> None:
    """Experts that are held over a step would take it for their next pass."""
    restored = restored_experts(streams)
    restored.weights.index = layout_index(placed(ExpertLayout.at_home(2, 2, 2), at_home=True), CPU)
    restored.make_wait()
    restored.gate(torch.ones(2, requires_grad=True))
    assert restored._wait is None


def test_a_layer_that_follows_itself_waits_for_each_pass_of_a_held_step(
    streams: ExchangeStreams,
) -> None:
    """Both passes have the same experts, which hold the wait of the one that comes."""
    held = restored_experts(streams, kinds=(Kind.STEP,))
    held.begin_step(held.index, 2)
    tokens = ones(needs_grad=True)
    with mock.patch.object(held.grads, "finish_reduce", wraps=held.grads.finish_reduce) as finish:
        held.make_wait()
        first = held.dispatch(held.gate(tokens))
        held.make_wait()
        middle = experts(held, first, ones(needs_grad=True))
        second = held.dispatch(held.gate(middle))
        experts(held, second, ones(needs_grad=True)).sum().backward()
    assert finish.call_count == 2 and streams.exchange.count.reduces == 1
    held.free()
    assert is_over(held)


def test_sums_of_a_step_that_an_error_ended_are_dropped_with_their_memory(
    streams: ExchangeStreams,
) -> None:
    held = restored_experts(streams, kinds=(Kind.STEP,))
    parameter = held.share.parameters[0]
    for passes_done, passes in ((1, 2), (1, 1)):
        held.begin_step(held.index, passes)
        assert streams.grads.in_use == 0
        for _ in range(passes_done):
            compute(held, ones(needs_grad=True), ones(needs_grad=True)).sum().backward()
    held.free()
    assert is_over(held) and streams.grads.in_use == 0
    alone = restored_experts(streams)
    compute(alone, ones(needs_grad=True), ones(needs_grad=True)).sum().backward()
    assert torch.equal(parameter.main_grad, alone.share.parameters[0].main_grad)  # type: ignore[attr-defined]


def test_parameters_without_main_gradients_are_refused(streams: ExchangeStreams) -> None:
    share = restored_experts(streams).share
    check_main_grads("layer 1", share)
    del share.parameters[1].main_grad  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"step, layer 1: .*DistributedDataParallel"):
        check_main_grads("layer 1", share)


def test_weights_are_kept_up_to_the_last_byte_and_their_memory_is_given_back(
    streams: ExchangeStreams,
) -> None:
    def kept(most_bytes: int) -> list[bool]:
        """Return whether weights stay of a second pass, and of a third after a backward."""
        of_run = replace(streams, most_kept_bytes=most_bytes)
        passes = [restored_experts(of_run) for _ in range(3)]
        outputs = []
        for restored in passes:
            outputs.append(compute(restored, ones(needs_grad=True), ones(needs_grad=True)).sum())
            if restored is passes[1]:
                outputs[0].backward()
        stayed = [restored.weights.are_here for restored in passes[1:]]
        passes[2].weights.stay()  # as its backward is next
        for output in outputs[1:]:
            output.backward()
        assert streams.weights.in_use == 0 and not streams.kept
        return stayed

    size = restored_experts(streams).share.restored_bytes(2)
    assert kept(size - 1) == [False, False]
    assert kept(size) == [False, True]
    assert kept(2 * size) == [True, True]


def test_weights_that_are_handed_on_are_not_kept_as_well(streams: ExchangeStreams) -> None:
    streams = replace(streams, most_kept_bytes=2**20)
    first = restored_experts(streams)
    second = RestoredExperts("layer 1", first.share, first.index, streams)
    first.weights.hand_on(second.weights)
    compute(first, ones(needs_grad=True), ones(needs_grad=True))
    assert not first.weights.are_here
    compute(second, ones(needs_grad=True), ones(needs_grad=True))
    assert second.weights.are_here, "nothing follows, and they fit"
    assert (streams.weights.in_use, streams.exchange.count.restores) == (1, 1)
    for weights in [*streams.kept]:
        weights.free()
    assert streams.weights.in_use == 0


def test_a_pass_that_has_its_weights_inherits_no_others(streams: ExchangeStreams) -> None:
    first = restored_experts(streams)
    second = RestoredExperts("layer 1", first.share, first.index, streams)
    first.weights.hand_on(second.weights)
    second.weights.start_restore()
    compute(first, ones(needs_grad=True), ones(needs_grad=True))
    assert streams.weights.in_use == 1
    compute(second, ones(needs_grad=True), ones(needs_grad=True)).sum().backward()
    assert streams.weights.in_use == 0


def test_a_backward_that_follows_at_once_has_its_forwards_weights(
    streams: ExchangeStreams,
) -> None:
    restored = restored_experts(streams)
    restored.weights.start_restore()
    restored.weights.fetch(restored.weights)
    compute(restored, ones(needs_grad=True), ones(needs_grad=True)).sum().backward()
    assert (streams.exchange.count.restores, streams.weights.in_use) == (1, 0)


def test_weights_that_stay_for_no_backward_are_freed(streams: ExchangeStreams) -> None:
    restored = restored_experts(streams, trained=(False, False))
    restored.weights.start_restore()
    restored.weights.stay()
    compute(restored, ones(needs_grad=False), ones(needs_grad=False))
    assert is_over(restored) and streams.weights.in_use == 0
