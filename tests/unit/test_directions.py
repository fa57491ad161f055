"""Weights of mxfp8 serve one direction: backward fetches others, and none is used in the wrong one.

Forward's matrices have known sums here, and those of backward ten times these.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from megatron_laer.life import Kind
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.share import Share
from megatron_laer.runtime.weights.slots import ExchangeStreams
from tests.placed import placed
from tests.unit.test_restored_experts import CPU, compute, is_over, ones, restored_experts
from tests.unit.test_restored_experts import streams as streams

FACTOR = 10.0
SUMS = 2 * 8 * 3 * 0.5, 2 * 8 * 3 * 0.25  # of both experts' elements in each matrix


@dataclass(frozen=True)
class Directed(Share):
    @functools.cached_property
    def for_backward(self) -> Share:
        others = [torch.nn.Parameter(FACTOR * part.detach()) for part in self.parameters]
        return Share.of_slices(others, [rows for rows, _ in self.sizes])


def directed(streams: ExchangeStreams, *kinds: Kind) -> RestoredExperts:
    return restored_experts(streams, values=(0.5, 0.25), kind_of_share=Directed, kinds=kinds)


def follow(
    restored: RestoredExperts, streams: ExchangeStreams, slots: tuple[int, int] = (1, 0)
) -> RestoredExperts:
    """Return another pass through the layer, by default with the slots in the other order."""
    index = layout_index(placed(ExpertLayout.from_slots(1, 2, 2, slots)), CPU)
    return RestoredExperts("layer 1", restored.share, index, streams)


def gone(*passes: RestoredExperts, streams: ExchangeStreams) -> bool:
    """Return whether all memory is given back, and no weights or gradients are left."""
    in_use = streams.weights.in_use + streams.grads.in_use
    held = any(one.backward_weights.are_here for one in passes)
    return in_use == 0 and not held and all(map(is_over, passes))


@pytest.mark.parametrize("reruns", [False, True], ids=["plain", "re-run"])
def test_each_direction_has_its_own_weights(streams: ExchangeStreams, reruns: bool) -> None:
    restored = directed(streams)
    count, tokens = streams.exchange.count, ones(needs_grad=True)
    if reruns:
        restored.expect_rerun()
        with torch.no_grad():
            compute(restored, tokens, ones(needs_grad=False))
        first = restored.first_in_backward()  # of the re-run, which comes first
        assert first is restored.weights
        first.start_restore()
        assert not restored.backward_weights.are_here
    output = compute(restored, tokens, ones(needs_grad=True), reruns=reruns)
    assert torch.equal(output, torch.full((4,), SUMS[0] * SUMS[1]))
    assert not restored.weights.are_here
    assert streams.weights.in_use == (1 if reruns else 0)
    output.sum().backward()
    assert torch.equal(tokens.grad, torch.full((4,), FACTOR**2 * SUMS[0] * SUMS[1]))  # type: ignore[arg-type]
    assert gone(restored, streams=streams)
    assert (count.restores, count.reduces) == (3 if reruns else 2, 1)


def test_passes_hand_on_weights_in_one_direction(streams: ExchangeStreams) -> None:
    first = directed(streams)
    second = follow(first, streams)
    first.weights.hand_on(second.weights)
    second.follow = first.first_in_backward
    tokens = ones(needs_grad=True)
    middle = compute(first, tokens, ones(needs_grad=True))
    assert second.weights.are_here
    compute(second, middle, ones(needs_grad=True)).sum().backward()
    expected = (FACTOR**2 * SUMS[0] * SUMS[1]) ** 2
    assert torch.equal(tokens.grad, torch.full((4,), expected))  # type: ignore[arg-type]
    assert gone(first, second, streams=streams)
    count = streams.exchange.count
    assert (count.restores, count.changes, count.reduces) == (2, 2, 2)


def test_backward_of_a_checkpoint_hands_no_weights_on_to_the_re_run_before_it(
    streams: ExchangeStreams,
) -> None:
    first = directed(streams)
    second = follow(first, streams, slots=(0, 1))
    first.expect_rerun()
    with torch.no_grad():
        compute(first, ones(needs_grad=False), ones(needs_grad=False))
    second.follow = first.first_in_backward
    compute(second, ones(needs_grad=True), ones(needs_grad=True)).sum().backward()
    assert first.weights.are_here
    assert not first.backward_weights.are_here
    assert torch.equal(first.weights.matrix(0), torch.full((2, 8, 3), 0.5))
    first.release()
    assert gone(first, second, streams=streams)


@pytest.mark.parametrize("from_forward", [False, True])
@pytest.mark.parametrize("to_forward", [False, True])
def test_an_operation_fetches_the_next_ones_weights_or_hands_its_own_on(
    streams: ExchangeStreams, from_forward: bool, to_forward: bool
) -> None:
    first = directed(streams)
    second = follow(first, streams)
    used = first.weights if from_forward else first.backward_weights
    wanted = second.weights if to_forward else second.backward_weights
    used.start_restore()
    used.fetch(wanted)
    same = from_forward == to_forward
    assert wanted.are_here != same
    used.used()
    assert not used.are_here
    held = wanted.matrix(0)
    factor = 1.0 if to_forward else FACTOR
    assert torch.equal(held, torch.full((2, 8, 3), factor * 0.5))
    count = streams.exchange.count
    assert (count.restores, count.changes) == ((1, 1) if same else (2, 0))
    second.release()
    assert gone(first, second, streams=streams)


def test_a_forward_fetches_the_weights_of_its_own_backward_at_once(
    streams: ExchangeStreams,
) -> None:
    restored = directed(streams)
    restored.weights.start_restore()
    restored.weights.fetch(restored.backward_weights)
    assert restored.backward_weights.are_here
    frozen = compute(restored, ones(needs_grad=True), ones(needs_grad=True))
    assert restored.backward_weights.are_here
    restored.expect_no_backward()
    assert frozen.requires_grad and gone(restored, streams=streams)


@pytest.mark.parametrize("reruns", [False, True], ids=["plain", "re-run"])
def test_a_step_holds_weights_of_both_directions(streams: ExchangeStreams, reruns: bool) -> None:
    held, count = directed(streams, Kind.STEP), streams.exchange.count
    index = held.index
    for number in range(2):
        held.begin_step(index, 2)
        for _ in range(2):
            tokens = ones(needs_grad=True)
            if reruns:
                held.expect_rerun()
                with torch.no_grad():
                    compute(held, tokens, ones(needs_grad=False))
            compute(held, tokens, ones(needs_grad=True), reruns=reruns).sum().backward()
            wanted = torch.full((4,), FACTOR**2 * SUMS[0] * SUMS[1])
            assert torch.equal(tokens.grad, wanted)  # type: ignore[arg-type]
        assert streams.weights.in_use == 2
        assert (count.restores, count.changes) == (2, 2 * number)
        index = layout_index(placed(ExpertLayout.from_slots(1, 2, 2, [1, 0])), CPU)
    held.free()
    assert gone(held, streams=streams)
