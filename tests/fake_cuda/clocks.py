"""`Checker` keeps a vector clock per stream, and finds unordered accesses to memory.

A stream's clock has the last operation of every other stream that it has waited for. Two accesses
to the same bytes, one of them a write, are a race unless the later one's stream had waited for the
earlier one. Memory is freed as CUDA's caching allocator frees it: the next allocation on its stream
may get it. So that stream must have waited for every other stream that used it unrecorded.

Orders by the host are ignored, apart from `host_waits`: a test must not rest on the host's
slowness.

A card with one hardware queue (`CUDA_DEVICE_MAX_CONNECTIONS=1`) starts kernels in the order of
their launch, so one that waits stops all later ones. An exchange of ours takes time. Hence no
launch that waits for it may follow right behind it, with no other stream's between, while a later
matrix product does not need it. So launches of the steady state are kept too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from tests.fake_cuda import findings

Clock = dict[int, int]  # by stream: the number of the last operation that was waited for

HOST = 0
"""Number of the host's own operations, in the place of a stream."""

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
_OURS = "the stream of "


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


@dataclass
class Launch:
    """Launch on a stream, and the launches that end before it starts, by their places."""

    stream: str
    after: set[int]
    name: str = ""
    exchanges: bool = False

    def __str__(self) -> str:
        return f"{self.name} on {self.stream}"


class Checker:
    """Collector of races, each once, and of launches; `place` names the code that runs."""

    def __init__(self, place: Callable[[], str]) -> None:
        self._place = place
        self._launches: list[Launch] = []
        self._places: dict[tuple[int, int], int] = {}
        # Of launches that are one; None outside of a group.
        self._together: list[int] | None = None
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
        number = clock[stream] = clock.get(stream, 0) + 1
        if stream == HOST or not findings.current.is_steady:
            return number
        last = (clock | {stream: number - 1}).items()
        after = {self._places[one] for one in last if one in self._places}
        place = len(self._launches)
        if self._together:
            (place,) = self._together
            self._launches[place].after |= after - {place}
        else:
            self._launches.append(Launch(self._name(stream), after))
            if self._together is not None:
                self._together.append(place)
        self._places[stream, number] = place
        return number

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
        if (place := self._places.get((stream, number))) is not None:
            self._launches[place].name = name
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
        if (place := self._places.get((stream, number))) is not None:
            self._launches[place].exchanges = True

    def held_up(self) -> list[str]:
        """Return launches that wait for an exchange of ours too early, each once."""
        needs: list[int] = []  # of each launch, all that end before it, as bits
        for launch in self._launches:
            bits = 0
            for other in launch.after:
                bits |= needs[other] | 1 << other
            needs.append(bits)
        products = [at for at, launch in enumerate(self._launches) if launch.name in _PRODUCTS]
        found: dict[str, None] = {}
        for place, launch in enumerate(self._launches):
            for at in launch.after:
                exchange = self._launches[at]
                is_ours = exchange.exchanges and exchange.stream.startswith(_OURS)
                between = self._launches[at + 1 : place]
                if is_ours and all(other.stream == exchange.stream for other in between):
                    later = (product for product in products if product > place)
                    if any(not needs[product] >> at & 1 for product in later):
                        found[f"{launch} waits for {exchange}, and later products do not"] = None
        return list(found)

    @contextlib.contextmanager
    def grouping(self) -> Iterator[None]:
        """Record operations together that NCCL launches as one kernel."""
        batch = dist.batch_isend_irecv

        def together(operations: list[Any]) -> Any:
            self._together = []
            try:
                return batch(operations)
            finally:
                self._together = None

        with mock.patch.object(dist, "batch_isend_irecv", together):
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
