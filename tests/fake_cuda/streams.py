"""Replacements of `torch.cuda`'s streams and events that report CUDA's orders to a checker.

They order nothing themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from unittest import mock

import torch

from megatron_laer.runtime.comm import copies, streams
from tests.fake_cuda import findings, labels
from tests.fake_cuda.clocks import HOST, Checker, Clock

_numbers = itertools.count(1)


class Simulation:
    """Current simulation: its checker, current streams (innermost last), and streams of leaves.

    `arrivals` has, for each leaf's node with a stream of its own, the events that its stream waits
    for in this backward.
    """

    checker: ClassVar[Checker]
    current: ClassVar[list[Stream]]
    leaf_streams: ClassVar[set[Stream]]
    arrivals: ClassVar[dict[Any, list[Event]]]


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}
        self._recorded_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_s = time.perf_counter()
        self.clock = Simulation.checker.now((stream or current_stream()).number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        """Return False, the worst case: the host never sees finished work."""
        return False

    def elapsed_time(self, end: Event) -> float:
        return (end._recorded_s - self._recorded_s) * 1e3

    def synchronize(self) -> None:
        findings.current.note(findings.Kind.WAIT, "Event.synchronize")
        Simulation.checker.host_waits(self.clock)


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.number = self.cuda_stream = self.stream_id = next(_numbers)
        self.device = labels.card() if device is None else device
        self.priority = priority
        self.native_handle = self.number

    def __repr__(self) -> str:
        return f"stream {self.number}"

    def __enter__(self) -> Stream:
        Simulation.current.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        Simulation.current.pop()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def wait_event(self, event: Event) -> None:
        Simulation.checker.wait(self.number, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.record_event().synchronize()


def current_stream(_: Any = None) -> Stream:
    return Simulation.current[-1]


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Replace `torch.cuda.stream`, which ignores None and foreign streams."""
    with stream if isinstance(stream, Stream) else contextlib.nullcontext():
        yield


def behind(stream: Stream, other: Stream) -> None:
    """Let a stream wait for another, even if a fault replaced `wait_stream`."""
    checker = Simulation.checker
    checker.wait(stream.number, checker.now(other.number))


def drain() -> None:
    """Let the host wait for the current stream."""
    Simulation.checker.host_waits(Simulation.checker.now(current_stream().number))


def host_waits(what: str) -> None:
    """Note an operation that waits for the current stream, and let the host wait."""
    if findings.current.raises:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    findings.current.note(findings.Kind.WAIT, what)
    drain()


def read_by_host(name: str, tensor: torch.Tensor) -> None:
    checker = Simulation.checker
    checker.access(HOST, checker.enqueue(HOST), tensor, writes=False, name=name)


def launched(name: str, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> None:
    """Report a kernel's launch on the current stream."""
    checker, stream = Simulation.checker, current_stream().number
    number = checker.enqueue(stream)
    for tensors, writes in ((read, False), (written, True)):
        for tensor in tensors:
            checker.access(stream, number, tensor, writes=writes, name=name)


def _synchronize(_: Any = None) -> None:
    findings.current.note(findings.Kind.WAIT, "torch.cuda.synchronize")
    for number in range(1, next(_numbers)):
        Simulation.checker.host_waits(Simulation.checker.now(number))


@contextlib.contextmanager
def replaced(checker: Checker) -> Iterator[None]:
    """Replace streams inside the block, whose orders the checker gets."""
    Simulation.checker = checker
    compute = Stream()
    checker.names[compute.number] = "the compute stream"
    cuda: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": current_stream,
        "default_stream": lambda _=None: compute,
        "set_stream": _set_stream,
        "synchronize": _synchronize,
        "is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        for owner, name, replacement in (
            (torch.Tensor, "record_stream", _record_stream),
            (torch.UntypedStorage, "resize_", _resize),
            (streams.CudaStream, "__init__", _named(streams.CudaStream.__init__)),
            (copies.Download, "__init__", _named(copies.Download.__init__)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        Simulation.current, Simulation.leaf_streams = [compute], set()
        Simulation.arrivals = {}
        yield
        _synchronize()


def _set_stream(stream: Stream) -> None:
    """Go on on another stream, as Megatron does at its start if it captures graphs."""
    Simulation.checker.names[stream.number] = "the compute stream"
    Simulation.current[-1] = stream


def _named(true_init: Callable[..., None]) -> Callable[..., None]:
    """Name streams for the checker; copies to the host are those of counts."""

    def init(stream: Any, times: Any, *args: Any, **kwargs: Any) -> None:
        true_init(stream, times, *args, **kwargs)
        name = getattr(times, "name", "counts")
        if stream._stream is not None:
            Simulation.checker.names[stream._stream.number] = f"the stream of {name}"

    return init


_true_resize = torch.UntypedStorage.resize_


def _resize(storage: torch.UntypedStorage, size: int) -> Any:
    """Free memory as Megatron's combined schedule frees the inputs of its nodes."""
    if size == 0:
        Simulation.checker.free(storage.data_ptr())
    return _true_resize(storage, size)


def _record_stream(tensor: torch.Tensor, stream: Any) -> None:
    if isinstance(stream, Stream):
        Simulation.checker.recorded(stream.number, tensor)
