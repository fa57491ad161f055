"""`Checker` keeps a vector clock per stream, and finds unordered accesses to memory.

A stream's clock has the last operation of every other stream that it has waited for. Two accesses
to the same bytes, one of them a write, are a race unless the later one's stream had waited for the
earlier one. Memory is freed as CUDA's caching allocator frees it: the next allocation on its stream
may get it. So that stream must have waited for every other stream that used it unrecorded.

Orders by the host are ignored, apart from `host_waits`: a test must not rest on the host's
slowness.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Clock = dict[int, int]  # by stream: the number of the last operation that was waited for

HOST = 0
"""Number of the host's own operations, in the place of a stream."""


class Span(NamedTuple):
    """Bytes of a storage, from `start` to before `end`, as one stream read or wrote them."""

    stream: int
    start: int
    end: int
    writes: bool

    def conflicts(self, other: Span) -> bool:
        overlaps = self.start < other.end and other.start < self.end
        return overlaps and (self.writes or other.writes)


class Operation(NamedTuple):
    number: int
    name: str


@dataclass
class Memory:
    """State of a storage.

    `home` is the stream it was allocated on, if the checker saw that. `recorded` are streams that
    the allocator knows of, `accesses` the last operation of each kind of access. Freed memory waits
    until those streams have come as far as `awaited`.
    """

    home: int | None
    recorded: set[int] = field(default_factory=set)
    awaited: Clock = field(default_factory=dict)
    accesses: dict[Span, Operation] = field(default_factory=dict)


class Checker:
    """Collector of races, each once; `place` names the code that runs."""

    def __init__(self, place: Callable[[], str]) -> None:
        self._place = place
        self.names: dict[int, str] = {}
        self.operations = 0
        self.frees = 0
        self._races: dict[str, None] = {}
        self._clocks: defaultdict[int, Clock] = defaultdict(dict)
        self._memory: dict[int, Memory] = {}
        self._free: defaultdict[int, list[Memory]] = defaultdict(list)

    @property
    def races(self) -> list[str]:
        return list(self._races)

    def enqueue(self, stream: int) -> int:
        """Number the next operation of a stream, behind the host's own operations and waits."""
        self.operations += 1
        clock = self._clocks[stream]
        _merge(clock, self._clocks[HOST])
        clock[stream] = clock.get(stream, 0) + 1
        return clock[stream]

    def now(self, stream: int) -> Clock:
        """Return the clock of an event that is recorded now on this stream."""
        _merge(self._clocks[stream], self._clocks[HOST])
        return dict(self._clocks[stream])

    def wait(self, stream: int, event: Clock) -> None:
        _merge(self._clocks[stream], event)

    def host_waits(self, event: Clock) -> None:
        """Let the host wait for an event, and so all work that it enqueues from now on."""
        _merge(self._clocks[HOST], event)

    def access(
        self, stream: int, number: int, tensor: torch.Tensor, *, writes: bool, name: str
    ) -> None:
        """Note that operation `number` of a stream reads or writes a tensor."""
        if tensor.numel() == 0 or tensor.device.type == "meta":
            return
        memory = self._known(tensor, None)
        new = Span(stream, *_bytes_of(tensor), writes)
        clock = self._clocks[stream]
        for old, operation in memory.accesses.items():
            if new.conflicts(old) and clock.get(old.stream, 0) < operation.number:
                self._found(
                    f"{name} on {self._name(stream)} {'writes' if writes else 'reads'} what "
                    f"{operation.name} on {self._name(old.stream)} "
                    f"{'writes' if old.writes else 'reads'}: nothing orders them"
                )
        if writes:  # work ordered before this write is ordered before all later work
            covered = [old for old in memory.accesses if _covers(new, old)]
            for old in covered:
                del memory.accesses[old]
        memory.accesses[new] = Operation(number, name)

    def exchanged(self, stream: int, number: int) -> None:
        """Note that operation `number` of a stream is a collective."""

    def held_up(self) -> list[str]:
        """Return launches that wait too early for a single hardware queue; none with many."""
        return []

    @contextlib.contextmanager
    def grouping(self) -> Iterator[None]:
        """Do nothing inside the block: with many queues, launches need no groups."""
        yield

    def allocated(self, stream: int, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        if tensor.numel() == 0 or storage.data_ptr() in self._memory:
            return False
        if stream == HOST:  # whose allocator waits for copies
            self._known(tensor, None)
            return True
        self._known(tensor, stream)
        self._reuse(stream)
        return True

    def recorded(self, stream: int, tensor: torch.Tensor) -> None:
        if tensor.numel():
            self._known(tensor, None).recorded.add(stream)

    def _known(self, tensor: torch.Tensor, home: int | None) -> Memory:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._memory:
            memory = self._memory[pointer] = Memory(home)
            # By reference: a new storage at this address is another memory.
            weakref.finalize(storage, _freed, weakref.ref(self), pointer, memory).atexit = False
        return self._memory[pointer]

    def free(self, pointer: int, of: Memory | None = None) -> None:
        """Note that the host freed memory: the next allocation of its stream may get it.

        With `of`, do so unless it was freed before.
        """
        if of is not None and self._memory.get(pointer) is not of:
            return
        memory = self._memory.pop(pointer, None)
        if memory is not None and memory.home is not None:
            self.frees += 1
            for stream in memory.recorded:
                _merge(memory.awaited, self.now(stream))
            self._free[memory.home].append(memory)

    def _reuse(self, home: int) -> None:
        """Let an allocation have all memory that was freed on its stream."""
        for memory in self._free.pop(home, []):
            clock = self.now(home)
            _merge(clock, memory.awaited)
            for span, operation in memory.accesses.items():
                is_known = span.stream in {home, *memory.recorded}
                if not is_known and clock.get(span.stream, 0) < operation.number:
                    self._found(
                        f"memory of {self._name(home)} is free while {operation.name} on "
                        f"{self._name(span.stream)} may still "
                        f"{'write' if span.writes else 'read'} it, and was not recorded"
                    )

    def _name(self, stream: int) -> str:
        return "the host" if stream == HOST else self.names.get(stream, f"stream {stream}")

    def _found(self, race: str) -> None:
        self._races[f"{race}, in {self._place()}"] = None


def _freed(checker: weakref.ref[Checker], pointer: int, memory: Memory) -> None:
    living = checker()
    if living is not None:
        living.free(pointer, memory)


def _merge(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


def _covers(new: Span, old: Span) -> bool:
    return new.start <= old.start and old.end <= new.end


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (sum((length - 1) * step for length, step in steps) + 1) * size
