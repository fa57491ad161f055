"""Index tensors are there before an exchange needs them, and as long as something reads them."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.layer.experts.main_grads import MegatronMainGrads
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import copies
from megatron_laer.runtime.comm import layout_index as layout_index_file
from megatron_laer.runtime.comm.exchange import HierarchicalExchange, ReusableWeights
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.stages import Stages
from megatron_laer.runtime.comm.streams import make_comm_stream
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import Slices
from megatron_laer.runtime.weights.restored import RestoredExperts
from tests.placed import placed

CPU = torch.device("cpu")
EXPERTS, ROWS, COLUMNS = 4, 5, 2


def one_rank() -> HierarchicalExchange:
    """Make the exchange of a group of one rank, which sends nothing but uses the index."""
    groups: Any = SimpleNamespace(rank=0, size=1)
    nothing = Stages(None, None)
    return HierarchicalExchange(groups, 1, nothing, nothing)


def index_of(*slots: int) -> LayoutIndex:
    return layout_index(placed(ExpertLayout.from_slots(1, EXPERTS, EXPERTS, slots)), CPU)


def tensors_of(index: LayoutIndex) -> list[torch.Tensor]:
    found = [index.slot_expert_S]
    for restore in index._restores.values():
        found += [restore.sent_experts, restore.position_n]
    for reduce in index._reduces.values():
        found += [sums.uploaded for sums in (reduce.intra_node, reduce.inter_node) if sums]
    return found


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of functions that build index tensors, at each call."""
    calls: list[str] = []
    for name in ("restore_index", "reduce_index"):
        original = getattr(layout_index_file, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(layout_index_file, name, counted)
    return calls


def test_after_preparation_exchanges_build_nothing(built: list[str]) -> None:
    exchange, before, after = one_rank(), index_of(0, 1, 2, 3), index_of(0, 3, 2, 1)
    exchange.prepare_restore(before)
    exchange.prepare_restore(after, before)
    exchange.prepare_restore(after)
    exchange.prepare_reduce(after)
    assert built == ["restore_index"] * 3 + ["reduce_index"]
    slice_ErK = torch.randn(EXPERTS, ROWS, COLUMNS)
    for _ in range(2):
        matrix_CRK = exchange.restore(slice_ErK, before, ROWS)
        reuse = ReusableWeights(before, matrix_CRK)
        exchange.restore(slice_ErK, after, ROWS, reuse=reuse)
        assert torch.equal(matrix_CRK, slice_ErK[[0, 3, 2, 1]])
        assert torch.equal(exchange.restore(slice_ErK, after, ROWS), matrix_CRK)
        assert torch.equal(exchange.reduce(matrix_CRK, after), slice_ErK)
    assert len(built) == 4


def restored_experts(index: LayoutIndex, streams: ExchangeStreams) -> RestoredExperts:
    parameters = (torch.nn.Parameter(torch.randn(EXPERTS, ROWS, COLUMNS)),)
    return RestoredExperts(
        "layer 1", Slices(parameters, (ROWS,), MegatronMainGrads()), index, streams
    )


def test_a_layout_made_for_a_pass_is_indexed_before_and_outside_of_its_exchanges(
    built: list[str],
) -> None:
    streams = ExchangeStreams(
        one_rank(),
        parameters=make_comm_stream("parameters", CPU, overlaps=True),
        gradients=make_comm_stream("gradients", CPU, overlaps=True),
    )
    restored = restored_experts(index_of(0, 1, 2, 3), streams)
    restored.weights.start_restore()
    restored.weights.change(index_of(2, 1, 0, 3))
    assert built == ["restore_index"] * 2, "for all slots, and for those that differ"
    restored.weights.matrix(0)
    restored.prepare_backward()
    assert built[2:] == ["restore_index", "reduce_index"]
    restored.weights.free()
    restored.weights.start_restore()
    restored.grads.start_reduce([restored.weights.matrix(0)])
    restored.grads.finish_reduce()
    assert len(built) == 4
    streams.close()


def test_a_change_on_the_stream_of_the_restore_does_not_count_as_waiting() -> None:
    """Expect one wait of the compute, for the matrix."""
    stream = make_comm_stream("parameters", CPU, overlaps=True)
    waits = mock.Mock()
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


def test_a_microbatch_holds_its_index_tensors_while_other_layouts_come_and_go() -> None:
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
    restored.prepare_backward()
    held = [weakref.ref(tensor) for tensor in tensors_of(restored.index)]
    assert len(held) == 4, "of the layout, a restore (two) and a reduce"
    for slots in itertools.permutations(range(EXPERTS)):
        streams.exchange.prepare_restore(index_of(*slots))
    gc.collect()
    assert all(tensor() is not None for tensor in held)
    goes_on.set()
    slice_ErK = restored._share.parameters[0]
    assert torch.equal(restored.weights.matrix(0), slice_ErK[[2, 1, 0, 3]])
    restored.weights.free()
    streams.close()
    del restored
    gc.collect()
    assert all(tensor() is None for tensor in held)


def test_each_exchange_tells_the_allocator_of_all_index_tensors_that_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: set[int] = set()
    monkeypatch.setattr(
        "megatron_laer.runtime.comm.exchange.read_here",
        lambda tensor: told.add(tensor.untyped_storage().data_ptr()),
    )
    exchange, before, after = one_rank(), index_of(0, 1, 2, 3), index_of(0, 3, 2, 1)
    slice_ErK = torch.randn(EXPERTS, ROWS, COLUMNS)
    matrix_CRK = exchange.restore(slice_ErK, before, ROWS)
    exchange.restore(slice_ErK, after, ROWS, reuse=ReusableWeights(before, matrix_CRK))
    exchange.reduce(matrix_CRK, after)
    for index in (before, after):
        read = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(index)[1:]}
        assert read
        assert read <= told


def test_on_cuda_the_current_stream_is_recorded() -> None:
    tensor = mock.Mock(device=torch.device("cuda", 0))
    with mock.patch.object(torch.cuda, "current_stream", return_value="stream of an exchange"):
        copies.read_here(tensor)
        copies.read_here(torch.zeros(1))  # on the CPU there is nothing to record
    tensor.record_stream.assert_called_once_with("stream of an exchange")
