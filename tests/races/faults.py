"""Deliberate faults of stream code, one at a time; the checker must find each.

A fault replaces a function of the package by one that lacks an order, and is put back after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Any
from unittest import mock

import torch
from torch.distributed import distributed_c10d

from megatron_laer.layer.dispatch.dispatcher import SlotTokenDispatcher
from megatron_laer.plugin import steps
from megatron_laer.runtime.comm import copies
from megatron_laer.runtime.comm import steps as comm_steps
from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.collectives import TokenSizesExchange
from megatron_laer.runtime.comm.copies import Download
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.steps import SideBySide, Steps
from megatron_laer.runtime.comm.streams import (
    CommStream,
    CudaStream,
    OneQueueStream,
    _StreamResult,
)
from megatron_laer.runtime.weights import main_grads
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored_weights import RestoredWeights
from megatron_laer.runtime.weights.slot_grads import SlotGrads
from tests.fake_cuda import streams
from tests.fake_cuda.fault import Fault, replaced
from tests.fake_cuda.observing import AsyncWork


class Scene(StrEnum):
    """Settings with which the layers of `layers.py` train."""

    PLAIN = "plain"
    FRESH = "fresh layouts after the gate"
    REPEATED = "a layer is passed twice, under two layouts"
    STEP = "experts held over a step"
    AUTOGRAD = "gradients left to autograd"
    NODE = "exchange through nodes of one rank"


_submit = CudaStream.submit
_finish = OneQueueStream.finish
_start_reduce = SlotGrads.start_reduce
_add = SlotGrads.add
_finish_reduce = SlotGrads.finish_reduce
_reduce = Exchange.reduce_steps
_change = RestoredWeights.change
_start_download = Download.start
_start_sizes = TokenSizesExchange.start
_upload = copies.upload
_next = SideBySide.next


def _nothing(*_: Any, **__: Any) -> None: ...


def _result_at_once(pending: Any) -> torch.Tensor:
    result: torch.Tensor = pending._result
    return result


def _unordered_result(stream: Any, work: Any, label: str) -> Any:
    """Record the event before the work instead of after it."""
    stream._stream.wait_stream(streams.current_stream())
    done = stream._stream.record_event()
    with torch.no_grad(), torch.cuda.stream(stream._stream):
        return _StreamResult(work(), done, stream.times, label)


def _on_new_stream(stream: Any, work: Any, label: str) -> Any:
    stream._stream = torch.cuda.Stream()
    return _submit(stream, work, label)


def _uploaded_on_new_stream(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    with streams.Stream():
        return _upload(tensor, device)


@contextlib.contextmanager
def _one_workspace() -> Iterator[None]:
    true_init = Exchange.__init__

    def init(exchange: Any, *args: Any, **kwargs: Any) -> None:
        true_init(exchange, *args, **kwargs)
        exchange.reduced.workspace = exchange.restored.workspace

    with mock.patch.object(Exchange, "__init__", init):
        yield


def _one_buffer(pool: Any, shape: Any, dtype: Any, device: Any) -> torch.Tensor:
    pool.in_use += 1
    key = shape, dtype, device
    if not pool._free[key]:
        pool._free[key].append(torch.empty(shape, dtype=dtype, device=device))
    tensor: torch.Tensor = pool._free[key][-1]
    return tensor


def _reduce_and_put_back(grads: Any, grads_CRK: Any) -> None:
    """Put whole gradients back when they are sent instead of when they have arrived."""
    _start_reduce(grads, grads_CRK)
    grads.free()


def _reduce_and_reset_sums(grads: Any, grads_CRK: Any) -> None:
    """Reuse a step's sums when they are sent."""
    _add(grads, grads_CRK)
    if grads._left == grads._num_passes:
        for sum_CRK in grads._written_CRK:
            sum_CRK.zero_()


def _finish_at_once(grads: Any) -> Any:
    """Report to Megatron that gradients were added, without waiting until they are."""
    with mock.patch.object(_StreamResult, "wait", _result_at_once):
        return _finish_reduce(grads)


def _add_elsewhere(exchange: Any, *args: Any, add_to: Any, **kwargs: Any) -> Steps:
    """Add to main gradients on a stream of its own, once there are sums, without a wait for it."""
    summed = yield from _reduce(exchange, *args, **kwargs)
    elsewhere = streams.Stream()
    streams.behind(elsewhere, streams.current_stream())
    summed.record_stream(elsewhere)  # type: ignore[arg-type]
    with torch.cuda.stream(elsewhere):  # type: ignore[arg-type]
        add_to.add_(summed)
    result: torch.Tensor = add_to
    return result


def _reduce_at_once(stream: Any, work: Any, label: str) -> Any:
    """Let only the stream of gradients not wait for the compute."""
    is_reduce = label.kind == "reduce"
    waits = mock.patch.object(streams.Stream, "wait_stream", _nothing)
    with waits if is_reduce else contextlib.nullcontext():
        return _submit(stream, work, label)


def _finish_on_compute(stream: Any) -> None:
    """Launch what follows an exchange on the caller's stream."""
    with mock.patch.object(torch.cuda, "stream", lambda _: contextlib.nullcontext()):
        _finish(stream)


def _change_on_the_other_stream(weights: Any, index: Any) -> None:
    """Fetch slots that changed on the stream of gradients, with the workspace of restores."""
    swapped = ExchangeStreams(
        weights._streams.exchange,
        parameters=weights._streams.gradients,
        gradients=weights._streams.gradients,
    )
    true_streams, weights._streams = weights._streams, swapped
    try:
        _change(weights, index)
    finally:
        weights._streams = true_streams


def _read_without_waiting(_: Any, __: Any, pinned: torch.Tensor) -> torch.Tensor:
    return pinned.clone()


def _sizes_without_waiting(exchange: Any, sizes_Z: torch.Tensor) -> Any:
    """Read the sizes of token exchanges, and only these, before they are there."""
    with mock.patch.object(Download, "_read", _read_without_waiting):
        return _start_sizes(exchange, sizes_Z)


def _copy_at_once(download: Any, tensor: torch.Tensor) -> Any:
    """Copy to the host without waiting for the source."""
    with mock.patch.object(streams.Stream, "wait_stream", _nothing):
        return _start_download(download, tensor)


def _let_go_of_the_source(download: Any, tensor: torch.Tensor) -> Any:
    """Free the source of a copy to the host too early."""
    read = _start_download(download, tensor)
    done, _ = download._latest
    download._latest = done, torch.empty(0)
    return read


def _upload_again(dispatcher: Any, plan: Any, device: torch.device) -> torch.Tensor:
    """Upload in a re-run too, from the same buffer and behind no gate."""
    runs: torch.Tensor = dispatcher._upload.start(torch.from_numpy(plan.quotas.runs), device)
    return runs


def _works_without_order(manager: Any) -> None:
    for work in manager.works:
        work.finish()


@contextlib.contextmanager
def _activations_at_once() -> Iterator[None]:
    """Wait for no collective, and omit the synchronisation that Megatron adds to batches."""
    with (
        mock.patch.object(AsyncWork, "order", _nothing),
        mock.patch.object(torch.cuda, "synchronize", _nothing),
    ):
        yield


@contextlib.contextmanager
def _without_completion() -> Iterator[None]:
    """Record no event when the experts' input gradients are there."""
    from megatron.core.transformer.moe.moe_layer import _RecordExpertDgradCompletion

    def apply(_: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with mock.patch.object(_RecordExpertDgradCompletion, "apply", apply):
        yield


def _one_by_one(side_by_side: Any) -> bool:
    """Launch each All-to-All by itself."""
    with mock.patch.object(comm_steps, "one_launch", lambda *_: contextlib.nullcontext()):
        return _next(side_by_side)


LAYER_FAULTS = {
    "submit does not wait for the compute": Fault(
        replaced(streams.Stream, "wait_stream", _nothing)
    ),
    "wait waits for nothing": Fault(replaced(_StreamResult, "wait", _result_at_once)),
    "an event is recorded before the work and not after it": Fault(
        replaced(CudaStream, "submit", _unordered_result)
    ),
    "each exchange has a stream of its own": Fault(replaced(CudaStream, "submit", _on_new_stream)),
    "restores and reduces share a workspace": Fault(_one_workspace),
    "a pool hands out a buffer twice": Fault(replaced(BufferPool, "take", _one_buffer)),
    "whole gradients are put back when they are sent": Fault(
        replaced(SlotGrads, "start_reduce", _reduce_and_put_back)
    ),
    "nothing waits until main gradients are added to": Fault(
        replaced(SlotGrads, "finish_reduce", _finish_at_once),
        "what add_ on the stream of gradients",
    ),
    "main gradients are added to next to the stream of gradients": Fault(
        replaced(Exchange, "reduce_steps", _add_elsewhere), "what add_ on"
    ),
    "reduces do not wait for the gradients that they send": Fault(
        replaced(CudaStream, "submit", _reduce_at_once),
        "on the stream of gradients reads what mm on the compute stream writes",
    ),
    "nothing waits for an upload on a stream of its own": Fault(
        replaced(copies, "upload", _uploaded_on_new_stream),
        "what _to_copy on stream",
    ),
    "nothing waits for the copy of counts": Fault(
        replaced(Download, "_read", _read_without_waiting),
        "reads what copy_ on the stream of counts writes",
    ),
    "counts are copied while they are gathered": Fault(
        replaced(Download, "start", _copy_at_once),
        "copy_ on the stream of counts reads what _allgather_base_",
    ),
    "gathered counts are freed before they are copied": Fault(
        replaced(Download, "start", _let_go_of_the_source),
        "is free while copy_ on the stream of counts may still read it",
    ),
    "nothing waits for a token exchange": Fault(
        replaced(AsyncWork, "order", _nothing), "alltoall_base_ on NCCL's"
    ),
    "a layout changes on the stream of gradients": Fault(
        replaced(RestoredWeights, "change", _change_on_the_other_stream), scene=Scene.FRESH
    ),
    "copies to slots are launched on the compute stream": Fault(
        replaced(OneQueueStream, "finish", _finish_on_compute),
        "on the compute stream reads what alltoall_base_ on the stream of",
        one_queue=True,
    ),
    "a step's sums are used again when they are sent": Fault(
        replaced(SlotGrads, "add", _reduce_and_reset_sums), scene=Scene.STEP
    ),
}

_IN_ONE_QUEUE = "one queue, experts at home by relay, full recompute"

TRAINING_FAULTS = {
    "nothing waits for weights that replicas gather": Fault(
        replaced(steps, "_await_weights", _nothing),
        *("allgather_into_tensor_coalesced_", "both overlaps, slices replicated"),
    ),
    "nothing waits for home experts that Megatron-FSDP gathers": Fault(
        replaced(steps, "await_weights", _nothing),
        "allgather_into_tensor_coalesced_",
        "Megatron-FSDP of gradients, home experts replicated",
        at_night=True,
    ),
    "nothing waits for gradients that replicas sum": Fault(
        replaced(distributed_c10d._CoalescingManager, "wait", _works_without_order),
        *("reduce_scatter_tensor_coalesced_", "both overlaps"),
    ),
    "nothing waits for activations of the stage before": Fault(
        _activations_at_once, "recv_", "virtual pipeline 2 x 2"
    ),
    "a re-run writes the buffer of an upload that may still run": Fault(
        replaced(SlotTokenDispatcher, "_runs", _upload_again),
        *("copy_ on the host writes what _to_copy on the compute stream reads", "full recompute"),
    ),
    "delayed weight gradients are reduced before they are computed": Fault(
        replaced(CudaStream, "submit", _reduce_at_once),
        "on the stream of gradients reads what mm on the compute stream writes",
        "combined 1F1B with delayed weight gradients, virtual pipeline 2 x 2",
        at_night=True,
    ),
    "hooks of home experts do not wait for the sums over replicas": Fault(
        replaced(main_grads, "order_hooks", _nothing),
        "what add_ on the stream of gradients",
        "experts at home, fused accumulation, both overlaps",
    ),
    "weight gradients do not wait for those of the inputs": Fault(
        *(_without_completion, "mm on stream"),
        "experts' weight gradients during the dispatch's backward",
    ),
    "nothing waits for the copy of token sizes": Fault(
        replaced(TokenSizesExchange, "start", _sizes_without_waiting),
        *("reads what copy_ on the stream of counts writes", "tokens through nodes of 2"),
    ),
    "copies are launched behind their exchange in one queue": Fault(
        replaced(OneQueueStream, "submit_exchanges", CommStream.submit_exchanges),
        "on the stream of parameters waits for alltoall_base_ on the stream of parameters",
        _IN_ONE_QUEUE,
    ),
    "matrices are exchanged one after the other in one queue": Fault(
        replaced(SideBySide, "next", _one_by_one),
        "alltoall_base_ on the stream of parameters waits for alltoall_base_ on the stream of",
        _IN_ONE_QUEUE,
    ),
}
