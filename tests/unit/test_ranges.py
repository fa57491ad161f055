"""Activities are ranges of a running profiler, and nothing without one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.autograd import profiler

from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.ranges import exchange_in_range, named_range

DISPATCH = Activity(Kind.DISPATCH, "layer 1")


def test_nothing_is_named_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "record_function", mock.Mock(side_effect=AssertionError))
    with named_range(DISPATCH):
        assert named_range(DISPATCH) is named_range(Activity(Kind.EXPERTS))
    sent = torch.ones(3, requires_grad=True)
    (received,) = exchange_in_range(DISPATCH, lambda tensor: (2 * tensor,), (sent,))
    received.sum().backward()
    assert sent.grad is not None and sent.grad.tolist() == [2, 2, 2]


def test_ranges_are_open_where_megatron_profiles_with_nsight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It enters `emit_nvtx`, by which torch's ranges become NVTX's; both need a card.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("_enable_profiler", "_disable_profiler"):
        monkeypatch.setattr(profiler, name, lambda *_: None)
    with profiler.emit_nvtx():
        assert isinstance(named_range(DISPATCH), profiler.record_function)
    assert not isinstance(named_range(DISPATCH), profiler.record_function)
