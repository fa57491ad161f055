"""Times of launched kernels on cards with a hardware queue per stream, or with one for all.

A card with one queue (`CUDA_DEVICE_MAX_CONNECTIONS=1`) starts kernels in the order of their launch:
one that is not ready keeps all later ones from starting. With many, it keeps only those that follow
it on its stream. All else is ideal: kernels that run at once do not slow each other down.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Kernel(NamedTuple):
    """Launch of a kernel.

    Attributes:
        after: kernels that end before it starts, by their places in the program: those before it on
            its stream, and those of events that are waited for.
        seconds: its length.
        meets: what it exchanges. The k-th kernels that exchange the same end together on all ranks
            that ever do, as long after the last one's start as they are long.
    """

    after: frozenset[int]
    seconds: float
    meets: tuple[Hashable, ...] = ()
    name: str = ""


class HostWait(NamedTuple):
    """Wait of the host for kernels, before it launches what follows."""

    after: frozenset[int]


Program = Sequence[Kernel | HostWait]
"""One rank's launches and waits, in their order."""


class Deadlock(RuntimeError):
    """Kernels that never start or never end."""


def makespan(programs: Sequence[Program], *, one_queue: bool, launch_s: float = 0.0) -> float:
    """Return the seconds from the first launch to the end of the last kernel on all ranks.

    Raises:
        Deadlock: with the first kernel of each rank that does not end.
    """
    meetings = _meetings(programs)
    ranks = [_Rank(program, one_queue, launch_s) for program in programs]
    while any([*(rank.advance() for rank in ranks), *(meeting.end(ranks) for meeting in meetings)]):
        pass
    stuck = {
        number: name for number, rank in enumerate(ranks) if (name := rank.first_without_end())
    }
    if stuck:
        raise Deadlock(f"never end, by rank: {stuck}")
    return max((end for rank in ranks for end in rank.ends.values()), default=0.0)


@dataclass
class _Rank:
    program: Program
    one_queue: bool
    launch_s: float
    starts: dict[int, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    _launched: dict[int, float] = field(default_factory=dict)
    _host_s: float = 0.0
    _place: int = 0
    _waiting: list[int] = field(default_factory=list)

    def advance(self) -> bool:
        """Launch and start what can be; return whether there was anything."""
        before = self._place, len(self.starts)
        self._launch()
        left = []
        for number, place in enumerate(self._waiting):
            if not self._start(place):
                left.append(place)
                if self.one_queue:
                    left += self._waiting[number + 1 :]
                    break
        self._waiting = left
        return before != (self._place, len(self.starts))

    def _launch(self) -> None:
        while self._place < len(self.program):
            item = self.program[self._place]
            if isinstance(item, HostWait):
                if not self.ends.keys() >= item.after:
                    return
                self._host_s = max(self._host_s, self._last_end(item.after))
            else:
                self._host_s += self.launch_s
                self._launched[self._place] = self._host_s
                self._waiting.append(self._place)
            self._place += 1

    def _start(self, place: int) -> bool:
        kernel = self.program[place]
        assert isinstance(kernel, Kernel)
        if not self.ends.keys() >= kernel.after:
            return False
        start = max(self._launched[place], self._last_end(kernel.after))
        if self.one_queue and self.starts:
            start = max(start, next(reversed(self.starts.values())))
        self.starts[place] = start
        if not kernel.meets:
            self.ends[place] = start + kernel.seconds
        return True

    def _last_end(self, places: Iterable[int]) -> float:
        return max((self.ends[place] for place in places), default=0.0)

    def first_without_end(self) -> str | None:
        for place, item in enumerate(self.program):
            if isinstance(item, Kernel) and place not in self.ends:
                return f"{item.name or 'kernel'}, launch {place}"
        return None


class _Meeting(NamedTuple):
    """Kernels of several ranks that end together: rank and place of each."""

    members: frozenset[tuple[int, int]]

    def end(self, ranks: Sequence[_Rank]) -> bool:
        """End the kernels once all have started; return whether they did now."""
        if any(place not in ranks[rank].starts for rank, place in self.members):
            return False
        if all(place in ranks[rank].ends for rank, place in self.members):
            return False
        begin = max(ranks[rank].starts[place] for rank, place in self.members)
        for rank, place in self.members:
            kernel = ranks[rank].program[place]
            assert isinstance(kernel, Kernel)
            ranks[rank].ends[place] = begin + kernel.seconds
        return True


def _meetings(programs: Sequence[Program]) -> list[_Meeting]:
    """Match kernels of different ranks; those that share a part of a batch are one meeting."""
    users: defaultdict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, program in enumerate(programs):
        for place, item in enumerate(program):
            for what in item.meets if isinstance(item, Kernel) else ():
                users[what][rank].append(place)
    joined: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for by_rank in users.values():
        for places in itertools.zip_longest(*by_rank.values()):
            members = {(rank, place) for rank, place in zip(by_rank, places, strict=True)}
            for member in [*members]:
                members |= joined.get(member, set())
            for member in members:
                joined[member] = members
    unique = {id(members): members for members in joined.values()}
    return [_Meeting(frozenset(members)) for members in unique.values()]
