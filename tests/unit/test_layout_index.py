"""A rank's part of an exchange is found once, and lives as long as something reads it."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.hops import Way, way_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm import segments
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.streams import finish, make_comm_stream
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.share import Share
from megatron_laer.runtime.weights.slots import ExchangeStreams
from tests.placed import placed

CPU = torch.device("cpu")
EXPERTS, ROWS, COLUMNS = 4, 5, 2


def one_rank() -> Exchange:
    """Make the exchange of a group of one rank, which sends nothing but uses the index."""
    groups: Any = SimpleNamespace(rank=0, size=1, node_size=1)

    def flat(placed: Placed) -> Way:
        return way_of(placed.geometry, ExchangeAlgorithm.FLAT)

    return Exchange(groups, [flat(index_of(0, 1, 2, 3).placed)], flat)


def index_of(*slots: int) -> LayoutIndex:
    return layout_index(placed(ExpertLayout.from_slots(1, EXPERTS, EXPERTS, slots)), CPU)


def test_a_part_of_an_exchange_is_found_once_for_its_rows_direction_and_layout_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[int, bool, bool]] = []
    original = segments.Chain.__init__

    def counted(chain: Any, way: Any, placed: Any, before: Any, *args: Any, back: bool) -> None:
        ((rows, _),) = args[1]
        found.append((rows, before is not None, back))
        original(chain, way, placed, before, *args, back=back)

    monkeypatch.setattr(segments.Chain, "__init__", counted)
    exchange, before = one_rank(), index_of(0, 1, 2, 3)
    indexes = [index_of(0, 3, 2, 1) for _ in range(2)]
    for rows, after in itertools.product((ROWS, 2 * ROWS), indexes * 2):
        slice_ErK, matrices = torch.randn(EXPERTS, rows, COLUMNS), ((rows, 1),)
        owned, slots_CRK = [slice_ErK.flatten(0, 1)], torch.empty_like(slice_ErK)
        finish(exchange.restore_steps(owned, before, matrices, out=slots_CRK))
        # Another index of the same layout before will do.
        had = index_of(0, 1, 2, 3)
        finish(exchange.restore_steps(owned, after, matrices, before=had, out=slots_CRK))
        assert torch.equal(slots_CRK, slice_ErK[[0, 3, 2, 1]])
        whole_CRK = torch.empty_like(slots_CRK)
        finish(exchange.restore_steps(owned, after, matrices, out=whole_CRK))
        assert torch.equal(whole_CRK, slots_CRK)
        sums = [torch.zeros_like(owned[0])]
        finish(exchange.reduce_steps(slots_CRK, after, matrices, add_to=sums))
        assert torch.equal(sums[0], owned[0])
    of_index = [(False, False), (True, False), (False, True)]
    expected = {(rows, *kind): 2 for rows in (ROWS, 2 * ROWS) for kind in of_index}
    for rows in (ROWS, 2 * ROWS):
        expected[rows, False, False] += 1  # of the index before
    assert Counter(found) == expected


def restored_experts(index: LayoutIndex, streams: ExchangeStreams) -> RestoredExperts:
    parameters = (torch.nn.Parameter(torch.randn(EXPERTS, ROWS, COLUMNS)),)
    return RestoredExperts("layer 1", Share.of_slices(parameters, (ROWS,)), index, streams)


def test_a_change_on_the_stream_of_the_restore_does_not_count_as_waiting() -> None:
    """Expect one wait of the compute, for the matrix."""
    stream = make_comm_stream("parameters", CPU, overlaps=True)
    waits = mock.Mock(return_value=torch.empty(EXPERTS, ROWS, COLUMNS))
    submit = stream.submit

    def observed(*args: Any) -> Any:
        pending = submit(*args)
        pending.wait = waits  # type: ignore[method-assign]
        return pending

    with mock.patch.object(stream, "submit", observed):
        restored = restored_experts(
            index_of(0, 1, 2, 3), ExchangeStreams(one_rank(), stream, gradients=stream)
        )
        restored.weights.start_restore()
        restored.weights.change(index_of(2, 1, 0, 3))
        stream.close()
        assert waits.call_count == 0
        restored.weights.matrix(0)
    assert waits.call_count == 1


def test_a_microbatch_holds_its_index_while_other_layouts_come_and_go() -> None:
    """Keep an index without other references until its submitted exchange starts."""
    streams = ExchangeStreams(
        one_rank(),
        parameters=make_comm_stream("parameters", CPU, overlaps=True),
        gradients=make_comm_stream("gradients", CPU, overlaps=True),
    )
    goes_on = threading.Event()
    streams.parameters.submit(lambda: torch.tensor(goes_on.wait()), "busy")
    restored = restored_experts(index_of(2, 1, 0, 3), streams)
    restored.weights.start_restore()
    index = weakref.ref(restored.index)
    restored.weights.index = index_of(0, 1, 2, 3)
    gc.collect()
    assert index() is not None
    goes_on.set()
    slice_ErK = restored.share.parameters[0]
    assert torch.equal(restored.weights.matrix(0), slice_ErK[[2, 1, 0, 3]])
    restored.weights.free()
    streams.close()
    del restored
    gc.collect()
    assert index() is None
