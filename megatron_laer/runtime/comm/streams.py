"""Communication streams: they overlap work with compute, in the order of submission.

`CommStream` is the interface of the scheduler. Its implementations are `CudaStream`, for a card
with one hardware queue `OneQueueStream`, `ThreadStream` on the CPU, and without overlap
`InlineStream`, on the caller's thread.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from megatron_laer.environment import has_one_queue
from megatron_laer.telemetry.activities import Activity
from megatron_laer.telemetry.clock import Stopwatch, Timestamp, make_clock
from megatron_laer.telemetry.ranges import named_range
from megatron_laer.telemetry.step_times import StepTimes

# Priority of CUDA streams for exchanges; lower numbers go first. Priority orders thread blocks:
# with compute's priority, 0, each small kernel of an exchange would wait until the running GEMM has
# started all its blocks. Transformer Engine's GEMMs use -1 too; the streams on which NCCL's
# high-priority groups send tokens precede this one. torch hands out streams of one priority in turn
# from a pool of 32. Few others use this pool, so a stream is hardly ever shared.
_EXCHANGE_PRIORITY = -2

# Time-out of `close` for the work in progress.
_CLOSE_S = 5.0

Task = Callable[[], torch.Tensor]
# An exchange in steps, so that what waits for an All-to-All may be launched later. It yields behind
# each All-to-All, where the next kernel would wait for what arrives, and says whether another one
# follows.
Steps = Generator[bool, None, torch.Tensor]


def finish(steps: Steps) -> torch.Tensor:
    """Run an exchange to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result


def has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def exchange_stream(device: torch.device) -> torch.cuda.Stream:
    """Create a CUDA stream with a priority above compute and below token exchanges."""
    return torch.cuda.Stream(device, priority=_EXCHANGE_PRIORITY)


def used_here(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of another stream, whose memory stays until the current one has used it."""
    if has_streams(tensor.device):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


class OneComputeStream:
    """Assertion that a single compute stream uses an object that does not order two of them."""

    def __init__(self, user: str) -> None:
        self._user = user
        self._stream: torch.cuda.Stream | None = None

    def check(self, device: torch.device) -> None:
        if not has_streams(device):
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = stream
        assert stream == self._stream, (
            f"{self._user} is used on {stream}, and was used on {self._stream}: nothing orders two "
            "compute streams here, so one would overwrite what the other still reads"
        )


class Pending(Protocol):
    """Result of work submitted to a communication stream."""

    def wait(self) -> torch.Tensor:
        """Return the result for use on the caller's stream; callable more than once."""
        ...

    def result(self) -> torch.Tensor:
        """Return the result, without waiting, to work submitted later to the same stream."""
        ...


class StreamTimes:
    """Compute's waits for a communication stream."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.clock = make_clock(device)
        self.exposed = Stopwatch(self.clock)
        self.step_times: StepTimes | None = None
        self.name = name

    def waited(self, start: Timestamp, activity: Activity) -> None:
        end = self.clock.now()
        self.exposed.add(start, end)
        if self.step_times is not None:
            self.step_times.add(replace(activity, waits=True), start, end)


class CommStream(Protocol):
    """Ordered queue of work; all ranks of a group must submit the same collectives in one order."""

    times: StreamTimes

    def submit(self, work: Task, activity: Activity) -> Pending:
        """Start `work`, without gradients, after all work queued so far on the caller's stream."""
        ...

    def submit_exchange(self, steps: Steps, activity: Activity) -> Pending:
        """Start an exchange, as `submit` does."""
        return self.submit(partial(finish, steps), activity)

    def go_on(self) -> None:
        """Launch the next All-to-All of the exchange in flight, if that was put off."""
        return

    def close(self) -> None:
        """End the stream; no more work may be submitted."""
        ...


def make_comm_stream(name: str, device: torch.device, *, overlaps: bool) -> CommStream:
    times = StreamTimes(name, device)
    if not overlaps:
        return InlineStream(times)
    if not has_streams(device):
        return ThreadStream(times, name)
    is_alone = has_one_queue(os.environ)
    return OneQueueStream(times, device) if is_alone else CudaStream(times, device)


class _Done:
    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        return self._result

    def result(self) -> torch.Tensor:
        return self._result


class InlineStream(CommStream):
    """Stream without overlap: work is done when `submit` returns."""

    def __init__(self, times: StreamTimes) -> None:
        self.times = times

    def submit(self, work: Task, activity: Activity) -> Pending:
        start = self.times.clock.now()
        with torch.no_grad(), named_range(activity):
            done = _Done(work())
        self.times.waited(start, activity)
        return done

    def close(self) -> None:
        """Do nothing."""


class _Promise:
    def __init__(self, times: StreamTimes, activity: Activity) -> None:
        self._times, self._activity = times, activity
        self._is_there = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def work(self, work: Task) -> None:
        try:
            self._result = work()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wake waiters, after the times are recorded."""
        self._is_there.set()

    def wait(self) -> torch.Tensor:
        if not self._is_there.is_set():
            start = self._times.clock.now()
            self._is_there.wait()
            self._times.waited(start, self._activity)
        return self.result()

    def result(self) -> torch.Tensor:
        if self._error is not None:
            raise self._error
        result: torch.Tensor = self._result
        return result


class ThreadStream(CommStream):
    """Stream on a thread, for gloo, whose collectives release the interpreter while they wait.

    Asynchronous collectives would not do: an exchange also gathers rows and lays out received ones.
    """

    def __init__(self, times: StreamTimes, name: str) -> None:
        self.times = times
        self._queue: queue.SimpleQueue[tuple[_Promise, Task, Activity] | None] = queue.SimpleQueue()
        # A daemon: a collective with a dead peer must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"fsep-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Task, activity: Activity) -> Pending:
        promise = _Promise(self.times, activity)
        self._queue.put((promise, work, activity))
        return promise

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        with torch.no_grad():  # gradient mode belongs to a thread
            while (job := self._queue.get()) is not None:
                promise, work, activity = job
                with named_range(activity):
                    promise.work(work)
                promise.finish()
                del job, promise, work  # otherwise the last result would live until the next job


class _StreamResult:
    def __init__(
        self, result: torch.Tensor, done: torch.cuda.Event, times: StreamTimes, activity: Activity
    ) -> None:
        self._result = result
        self._done = done
        self._times, self._activity = times, activity

    def wait(self) -> torch.Tensor:
        stream = torch.cuda.current_stream(self._result.device)
        if self._done.query():  # does not wait
            stream.wait_event(self._done)
        else:
            start = self._times.clock.now()
            stream.wait_event(self._done)
            self._times.waited(start, self._activity)
        self._result.record_stream(stream)
        return self._result

    def result(self) -> torch.Tensor:
        return self._result


class CudaStream(CommStream):
    """CUDA stream with a priority above compute and below token exchanges."""

    def __init__(self, times: StreamTimes, device: torch.device) -> None:
        self.times = times
        self._stream = exchange_stream(device)
        self._compute = OneComputeStream(f"the communication stream of {times.name}")

    def submit(self, work: Task, activity: Activity) -> Pending:
        self._compute.check(self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            with named_range(activity):
                result = work()
            return self._written(result, activity)

    def _written(self, result: torch.Tensor, activity: Activity) -> _StreamResult:
        # Keep the allocator from reusing its memory while this stream writes.
        result.record_stream(self._stream)
        return _StreamResult(result, self._stream.record_event(), self.times, activity)

    def close(self) -> None:
        """Do nothing: the CUDA stream ends with its last reference."""


class OneQueueStream(CudaStream):
    """CUDA stream for a card with one hardware queue, in which a kernel that waits stops all later.

    So exchanges are launched in two parts. `submit_exchange` launches all that leaves, and the
    first All-to-All. What waits for its arrival, such as the copies to slots, is launched when the
    result is waited for, or before the next submission. A second All-to-All goes when callers say
    that the first one had time (`go_on`).
    """

    def __init__(self, times: StreamTimes, device: torch.device) -> None:
        super().__init__(times, device)
        self._begun: tuple[Steps, _Promised] | None = None
        self._has_more = False

    def submit(self, work: Task, activity: Activity) -> Pending:
        self.finish()
        return super().submit(work, activity)

    def submit_exchange(self, steps: Steps, activity: Activity) -> Pending:
        self.finish()
        self._compute.check(self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        promised = _Promised(self, activity)
        self._begun = steps, promised
        self._advance()
        return promised

    def go_on(self) -> None:
        if self._has_more:
            self._advance()

    def finish(self) -> None:
        """Launch the rest of the exchange in flight."""
        while self._begun is not None:
            self._advance()

    def _advance(self) -> None:
        """Run to behind the next All-to-All, or to the end."""
        assert self._begun is not None
        steps, promised = self._begun
        activity = promised.activity
        with torch.no_grad(), torch.cuda.stream(self._stream), named_range(activity):
            try:
                self._has_more = next(steps)
            except StopIteration as end:
                self._begun, self._has_more = None, False
                promised.keep(self._written(end.value, activity))


class _Promised:
    """Result of an exchange whose rest may not be launched yet."""

    def __init__(self, stream: OneQueueStream, activity: Activity) -> None:
        self.activity = activity
        self._stream = stream
        self._pending: Pending | None = None

    def keep(self, pending: Pending) -> None:
        self._pending = pending

    def wait(self) -> torch.Tensor:
        return self._launched().wait()

    def result(self) -> torch.Tensor:
        return self._launched().result()

    def _launched(self) -> Pending:
        if self._pending is None:
            self._stream.finish()
        assert self._pending is not None
        return self._pending
