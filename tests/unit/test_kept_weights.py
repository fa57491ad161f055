"""Restored weights stay for their backward as far as memory goes, or are another pass's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams, KeptWeights
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.states import WeightState
from tests.unit.test_restored_experts import compute, ones, restored_experts
from tests.unit.test_restored_experts import streams as streams


def test_weights_are_kept_up_to_the_last_byte_and_their_memory_is_given_back() -> None:
    kept, one, other = KeptWeights(5), Mock(), Mock()
    one.free, other.free = (partial(kept.give_back, weights) for weights in (one, other))
    assert [kept.take(one, 6), kept.take(one, 3), kept.take(other, 3)] == [False, True, False]
    kept.give_back(one)
    kept.give_back(one)
    assert [kept.take(other, 2), kept.take(one, 3), kept.take(one, 1)] == [True, True, False]
    kept.release()
    assert kept.take(one, 5)


def test_weights_that_are_handed_on_are_not_kept_as_well(streams: ExchangeStreams) -> None:
    streams = replace(streams, kept=KeptWeights(2**20))
    first = restored_experts(streams)
    second = RestoredExperts("layer 1", first._share, first.index, streams)
    first.weights.hand_on(second.weights)
    compute(first, ones(needs_grad=True), ones(needs_grad=True))
    assert first.state.weights is WeightState.SHARDED
    compute(second, ones(needs_grad=True), ones(needs_grad=True))
    assert second.state.weights is WeightState.RESTORED, "nothing follows, and they fit"
    assert (streams.weights.in_use, streams.exchange.count.restores) == (2, 1)
    streams.kept.release()
    assert streams.weights.in_use == 0


def test_a_pass_that_has_its_weights_inherits_no_others(streams: ExchangeStreams) -> None:
    first = restored_experts(streams)
    second = RestoredExperts("layer 1", first._share, first.index, streams)
    first.weights.hand_on(second.weights)
    second.weights.start_restore()
    compute(first, ones(needs_grad=True), ones(needs_grad=True))
    assert streams.weights.in_use == 2
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
