"""Deliberate faults of code for CUDA, each of which the labelled device must find."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.layer.dispatch import row_map
from megatron_laer.layer.dispatch.dispatcher import SlotTokenDispatcher
from megatron_laer.layer.experts.gemm import loop
from megatron_laer.runtime import coordinator
from megatron_laer.runtime.comm import collectives, copies
from megatron_laer.runtime.comm.collectives import CountsExchange
from megatron_laer.runtime.comm.segments import Table
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.telemetry.clock import StreamClock
from tests.fake_cuda.device import COMPILED
from tests.fake_cuda.fault import Fault, replaced
from tests.fake_cuda.findings import Kind

KERNELS = "Triton's kernels are interpreted"
_HERE = "in tests/fake_cuda/faults.py:"
_DISPATCH = f"{Kind.MISMATCH} in megatron_laer/layer/dispatch/"

_preprocess = SlotTokenDispatcher.preprocess
_start_counts = CountsExchange.start
_sum_copies = row_map.sum_copies
_add = Table.add
_gather = dist.all_gather_into_tensor


def _uploads(replacement: Any) -> Callable[[], AbstractContextManager[Any]]:
    def start(_: Any, *given: Any) -> torch.Tensor:
        uploaded: torch.Tensor = replacement(*given)
        return uploaded

    @contextlib.contextmanager
    def uploading() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in (copies, collectives):
                stack.enter_context(mock.patch.object(module, "upload", replacement))
            stack.enter_context(mock.patch.object(copies.Upload, "start", start))
            yield

    return uploading


def _of_pageable_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)


def _blocking(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device)


def _forgotten(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor


def _to_another_card(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(torch.device("cuda", device.index + 1), non_blocking=True)


def _by_a_mask(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
    routing_map[routing_map].sum()
    return _preprocess(dispatcher, routing_map)


def _writes_by_a_mask(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
    changed = routing_map.clone()
    changed[routing_map] = changed.new_zeros(2 * len(changed))  # of two experts per token
    return _preprocess(dispatcher, routing_map)


def _reads_a_number(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
    assert int(routing_map.sum()) >= 0
    return _preprocess(dispatcher, routing_map)


def _by_numpy(dispatcher: Any, routing_map: torch.Tensor) -> torch.Tensor:
    assert routing_map.numpy().any()
    return _preprocess(dispatcher, routing_map)


def _synchronises(clock: Any) -> Any:
    torch.cuda.synchronize()
    return torch.cuda.Event(enable_timing=True)


def _gathers_too(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Gather the counts once more, as a fault changes them; gloo may refuse that."""

    def start(exchange: Any, counts_E: torch.Tensor, *args: Any) -> Any:
        wrong = change(counts_E)
        received = torch.empty(wrong.numel(), dtype=wrong.dtype, device=wrong.device)
        with contextlib.suppress(RuntimeError, ValueError):
            _gather(received, wrong, group=exchange._groups.tokens)
        return _start_counts(exchange, counts_E, *args)

    return replaced(CountsExchange, "start", start)


@contextlib.contextmanager
def _first_sums_do_not_add() -> Iterator[None]:
    """Launch no sums onto main gradients before the first step."""
    launch = coordinator.launch_exchange_kernels

    def add(part: Any, *args: Any, adds: bool) -> None:
        if not adds:
            _add(part, *args, adds=adds)

    def launched(*args: Any, **kwargs: Any) -> None:
        with mock.patch.object(Table, "add", add):
            launch(*args, **kwargs)

    with mock.patch.object(coordinator, "launch_exchange_kernels", launched):
        yield


def _adds_a_product(grad_Rn: torch.Tensor, input_nK: torch.Tensor, out_RK: torch.Tensor) -> None:
    torch.addmm(out_RK.zero_(), grad_Rn, input_nK, out_dtype=out_RK.dtype, out=out_RK)


def _sums_elsewhere(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Launch a kernel on a stream that waits for nothing."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return _sum_copies(*args, **kwargs)


FAULTS = {
    "an upload of pageable memory": Fault(
        _uploads(_of_pageable_memory), f"{Kind.PAGEABLE} {_HERE}_of_pageable_memory"
    ),
    "an upload that blocks": Fault(_uploads(_blocking), f"{Kind.WAIT} {_HERE}_blocking"),
    "a forgotten upload": Fault(_uploads(_forgotten), f"{_DISPATCH}permutation.py"),
    "a forgotten upload, and a kernel": Fault(
        _uploads(_forgotten), f"{_DISPATCH}kernels.py", KERNELS
    ),
    "a wrong index of the card": Fault(_uploads(_to_another_card), f"{_DISPATCH}permutation.py"),
    "a mask": Fault(
        replaced(SlotTokenDispatcher, "preprocess", _by_a_mask), f"{Kind.WAIT} {_HERE}_by_a_mask"
    ),
    "a write by a mask": Fault(
        replaced(SlotTokenDispatcher, "preprocess", _writes_by_a_mask),
        f"{Kind.WAIT} {_HERE}_writes_by_a_mask",
    ),
    "a number that is read back": Fault(
        replaced(SlotTokenDispatcher, "preprocess", _reads_a_number),
        f"{Kind.WAIT} {_HERE}_reads_a_number",
    ),
    "an array of the card": Fault(
        replaced(SlotTokenDispatcher, "preprocess", _by_numpy), f"{Kind.MISMATCH} {_HERE}_by_numpy"
    ),
    "a timestamp that synchronises": Fault(
        replaced(StreamClock, "now", _synchronises), f"{Kind.WAIT} {_HERE}_synchronises"
    ),
    "int16 over NCCL": Fault(
        _gathers_too(lambda counts_E: counts_E.to(torch.int16)), f"{Kind.COLLECTIVE} {_HERE}"
    ),
    "a view that is not contiguous over NCCL": Fault(
        _gathers_too(lambda counts_E: counts_E.repeat(2)[::2]), f"{Kind.COLLECTIVE} {_HERE}"
    ),
    "host memory over NCCL": Fault(
        _gathers_too(lambda counts_E: torch.zeros(len(counts_E))), f"{Kind.COLLECTIVE} {_HERE}"
    ),
    "a kernel on the wrong stream": Fault(
        replaced(row_map, "sum_copies", _sums_elsewhere), "dispatch/kernels.py:sum_rows", KERNELS
    ),
    "an operation newer than the oldest torch": Fault(
        replaced(loop, "_write_product", _adds_a_product), f"{Kind.REFUSED} {_HERE}_adds_a_product"
    ),
    "no launch before the first step": Fault(
        replaced(Coordinator, "_launch_kernels", lambda _: None),
        *(f"{COMPILED}: _rows_of_expert", KERNELS),
    ),
    "sums onto main gradients not launched before": Fault(
        _first_sums_do_not_add, f"{COMPILED}: _sum_segments", KERNELS
    ),
}
