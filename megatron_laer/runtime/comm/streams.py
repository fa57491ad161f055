"""A communication stream runs work beside the compute, in the order in which it was submitted.

`CommStream` is the interface that the scheduler sees: on CUDA a `CudaStream`, on the CPU a
`ThreadStream`, and without overlap an `InlineStream`, which works at once on the caller's thread.
They know nothing of experts.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from megatron_laer.telemetry.clock import Stopwatch, Timestamp, make_clock
from megatron_laer.telemetry.step_times import IntervalListener
from megatron_laer.telemetry.trace_events import COMPUTE, Activity

# The priority of CUDA streams for exchanges; lower numbers go first. Priority orders thread blocks:
# with that of compute, 0, each small kernel of an exchange would wait until the running GEMM has no
# block left to start. Transformer Engine's GEMMs use -1 too; the streams on which NCCL's groups of
# high priority send tokens go before this one. torch takes streams of one priority in turn from a
# pool of 32, and hardly anyone else takes from this pool, so nobody else gets the same stream.
_EXCHANGE_PRIORITY = -2

# How long a stream that is closed may take to end what it is doing.
_CLOSE_S = 5.0

Task = Callable[[], torch.Tensor]


def has_streams(device: torch.device) -> bool:
    """Return whether a device runs its work on CUDA streams."""
    return device.type == "cuda"


def exchange_stream(device: torch.device) -> torch.cuda.Stream:
    """Make a CUDA stream that goes before compute and after token exchanges."""
    return torch.cuda.Stream(device, priority=_EXCHANGE_PRIORITY)


class OneComputeStream:
    """Asserts that one compute stream uses an object, where nothing orders two of them."""

    def __init__(self, user: str) -> None:
        self._user = user
        self._stream: torch.cuda.Stream | None = None

    def check(self, device: torch.device) -> None:
        """Remember the caller's stream at the first call, and compare it at every other."""
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
    """Result of work that was submitted to a communication stream."""

    def wait(self) -> torch.Tensor:
        """Return the result, for use on the caller's stream; may be called more than once."""
        ...

    def result(self) -> torch.Tensor:
        """Return the result to work submitted later to the same stream, which waits for nothing."""
        ...


class StreamTimes:
    """Measures when a communication stream works, and when the compute waits for it.

    Attributes:
        name: of the communication stream.
        exposed: what the compute waited, on its own stream.
        listener: hears of the intervals, if anybody does.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.clock = make_clock(device)
        self.exposed = Stopwatch(self.clock)
        self.listener: IntervalListener | None = None
        self.name = name
        self._is_cuda = has_streams(device)

    def waited(self, start: Timestamp, activity: Activity) -> None:
        """Record that the compute waited since `start`."""
        end = self.clock.now()
        self.exposed.add(start, end)
        if self.listener is not None:
            self.listener.add(COMPUTE, replace(activity, waits=True), start, end)

    @contextlib.contextmanager
    def working(self, activity: Activity) -> Iterator[None]:
        """Record the work inside the `with` block, under this name in profilers."""
        named = torch.cuda.nvtx.range if self._is_cuda else torch.autograd.profiler.record_function
        start = None if self.listener is None else self.clock.now()
        with named(str(activity)):
            yield
        if self.listener is not None and start is not None:
            self.listener.add(self.name, activity, start, self.clock.now())


class CommStream(Protocol):
    """Runs work in order; every rank of a group must submit the same collectives in one order.

    Attributes:
        times: when it worked, and when the compute waited for it.
    """

    times: StreamTimes

    def submit(self, work: Task, activity: Activity) -> Pending:
        """Start `work` once everything that the caller's stream holds so far is done.

        Args:
            work: runs without gradients; the result is what `Pending.wait` returns.
            activity: names it in timelines and profilers.
        """
        ...

    def close(self) -> None:
        """End the stream; no more work may be submitted."""
        ...


def make_comm_stream(name: str, device: torch.device, *, overlaps: bool) -> CommStream:
    """Make a stream that runs beside the compute, or one that does the work at once."""
    times = StreamTimes(name, device)
    if not overlaps:
        return InlineStream(times)
    return CudaStream(times, device) if has_streams(device) else ThreadStream(times, name)


class _Done:
    """Result that exists already."""

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        return self._result

    def result(self) -> torch.Tensor:
        return self._result


class InlineStream:
    """Does not overlap: work is done when `submit` returns."""

    def __init__(self, times: StreamTimes) -> None:
        self.times = times

    def submit(self, work: Task, activity: Activity) -> Pending:
        """Do the work."""
        start = self.times.clock.now()
        with torch.no_grad(), self.times.working(activity):
            done = _Done(work())
        self.times.waited(start, activity)
        return done

    def close(self) -> None:
        """Do nothing: nothing runs."""


class _Promise:
    """Result that a thread will compute."""

    def __init__(self, times: StreamTimes, activity: Activity) -> None:
        self._times, self._activity = times, activity
        self._is_there = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def work(self, work: Task) -> None:
        """Compute the result, or keep the error."""
        try:
            self._result = work()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Let waiters go on: the result is there, and its times are recorded."""
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


class ThreadStream:
    """Runs work on a thread, for gloo, whose collectives release the interpreter while they wait.

    A thread rather than asynchronous collectives, because an exchange is more than one collective:
    it gathers rows, sends them, and lays out what arrives, in each of its stages.
    """

    def __init__(self, times: StreamTimes, name: str) -> None:
        self.times = times
        self._queue: queue.SimpleQueue[tuple[_Promise, Task, Activity] | None] = queue.SimpleQueue()
        # A daemon: a collective whose partner died must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"fsep-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Task, activity: Activity) -> Pending:
        promise = _Promise(self.times, activity)
        self._queue.put((promise, work, activity))
        return promise

    def close(self) -> None:
        """End the thread once its queue is done, if that is soon."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        with torch.no_grad():  # gradient mode belongs to a thread
            while (job := self._queue.get()) is not None:
                promise, work, activity = job
                with self.times.working(activity):
                    promise.work(work)
                promise.finish()
                del job, promise, work  # or the last result would live until the next job


class _StreamResult:
    """Result that a CUDA stream will have written."""

    def __init__(
        self, result: torch.Tensor, done: torch.cuda.Event, times: StreamTimes, activity: Activity
    ) -> None:
        self._result = result
        self._done = done
        self._times, self._activity = times, activity

    def wait(self) -> torch.Tensor:
        stream = torch.cuda.current_stream(self._result.device)
        if self._done.query():  # asks, and does not wait
            stream.wait_event(self._done)
        else:
            start = self._times.clock.now()
            stream.wait_event(self._done)
            self._times.waited(start, self._activity)
        self._result.record_stream(stream)
        return self._result

    def result(self) -> torch.Tensor:
        return self._result


class CudaStream:
    """Runs work on a CUDA stream of its own, before compute and after token exchanges."""

    def __init__(self, times: StreamTimes, device: torch.device) -> None:
        self.times = times
        self._stream = exchange_stream(device)
        self._compute = OneComputeStream(f"the communication stream of {times.name}")

    def submit(self, work: Task, activity: Activity) -> Pending:
        """Enqueue the work behind what the current stream holds; the host does not wait."""
        self._compute.check(self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            with self.times.working(activity):
                result = work()
            # Keep the allocator from reusing its memory while this stream writes.
            result.record_stream(self._stream)
            return _StreamResult(result, self._stream.record_event(), self.times, activity)

    def close(self) -> None:
        """Do nothing: the CUDA stream ends with its last reference."""
