"""Replacements of `torch.cuda`'s streams and events that report CUDA's orders to the checker.

They order nothing themselves, and let the package's code for CUDA run on tensors of the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import torch

from megatron_laer.runtime.comm import copies, streams
from megatron_laer.telemetry.clock import StreamClock
from tests.races.clocks import Checker, Clock

_numbers = itertools.count(1)


class Simulation:
    """Current simulation: its checker, current streams (innermost last), and streams of leaves."""

    checker: ClassVar[Checker]
    current: ClassVar[list[Stream]]
    leaf_streams: ClassVar[set[Stream]]


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Simulation.checker.now((stream or current_stream()).number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        """Return False, the worst case: the host never sees finished work."""
        return False

    def elapsed_time(self, _: Event) -> float:
        return 0.0

    def synchronize(self) -> None:
        Simulation.checker.host_waits(self.clock)


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.number = self.cuda_stream = self.stream_id = next(_numbers)
        self.device, self.priority = device, priority
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


class Card:
    """Replacement of the CUDA device for questions about its type and copies of host tensors."""

    type, index = "cuda", 0


class _OnCard:
    """Tensor that claims to be on the card."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device: Any = Card()
        self.record_stream = tensor.record_stream


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


@contextlib.contextmanager
def streams_on_cpu() -> Iterator[Checker]:
    """Replace streams inside the block, and yield the checker that watches them."""
    checker = Simulation.checker = Checker()
    compute = Stream()
    checker.names[compute.number] = "the compute stream"
    card: Any = Card()

    def synchronize(_: Any = None) -> None:
        for number in range(1, next(_numbers)):
            checker.host_waits(checker.now(number))

    cuda: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": current_stream,
        "default_stream": lambda _=None: compute,
        "set_stream": _refuse,
        "synchronize": synchronize,
        "is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        for owner, name, replacement in (
            (torch.cuda.nvtx, "range", lambda *_: contextlib.nullcontext()),
            (torch.Tensor, "record_stream", _record_stream),
            (torch.Tensor, "to", _copies_to(torch.Tensor.to)),
            (streams, "has_streams", lambda _: True),
            (copies, "has_streams", lambda _: True),
            (streams, "make_clock", lambda _: StreamClock()),
            (streams.CudaStream, "__init__", _named(streams.CudaStream.__init__)),
            (copies.Download, "__init__", _named(copies.Download.__init__)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        true_upload, true_read_here = copies.upload, copies.read_here
        _replace_everywhere(stack, "upload", lambda tensor, _: true_upload(tensor, card))
        _replace_everywhere(stack, "read_here", lambda tensor: true_read_here(_OnCard(tensor)))
        Simulation.current, Simulation.leaf_streams = [compute], set()
        yield checker
        synchronize()


def _refuse(stream: Any) -> None:
    raise NotImplementedError("torch.cuda.set_stream: nothing uses it; use torch.cuda.stream")


def _named(true_init: Callable[..., None]) -> Callable[..., None]:
    """Name streams for the checker; copies to the host are those of counts."""

    def init(stream: Any, times: Any, *args: Any, **kwargs: Any) -> None:
        true_init(stream, times, *args, **kwargs)
        name = getattr(times, "name", "counts")
        Simulation.checker.names[stream._stream.number] = f"the stream of {name}"

    return init


def _record_stream(tensor: torch.Tensor, stream: Any) -> None:
    if isinstance(stream, Stream):
        Simulation.checker.recorded(stream.number, tensor)


def copy_to_card(tensor: torch.Tensor, *, waits: bool) -> torch.Tensor:
    """Copy a host tensor on the current stream; the host waits for copies of unpinned memory."""
    copied = tensor.clone()
    if waits:
        current_stream().synchronize()
    return copied


def _copies_to(true_to: Callable[..., Any]) -> Callable[..., Any]:
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (args and isinstance(args[0], Card)):
            return true_to(tensor, *args, **kwargs)
        return copy_to_card(tensor, waits=not kwargs.get("non_blocking", False))

    return to


def _replace_everywhere(stack: contextlib.ExitStack, name: str, replacement: Any) -> None:
    """Replace a function of `upload` in every module that imports it by name, also meanwhile."""
    original = getattr(copies, name)
    stack.callback(_exchange_everywhere, name, replacement, original)
    _exchange_everywhere(name, original, replacement)


def _exchange_everywhere(name: str, present: Any, wanted: Any) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron_laer") and (
            vars(module).get(name) is present
        ):
            setattr(module, name, wanted)
