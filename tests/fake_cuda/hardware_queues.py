"""Times of launched kernels on cards with a hardware queue per stream, or with one for all.

A card with one queue (`CUDA_DEVICE_MAX_CONNECTIONS=1`) starts kernels in the order of their launch:
one that is not ready keeps all later ones from starting. With many, it keeps only those that follow
it on its stream. All else is ideal: kernels that run at once do not slow each other down.

So every moment is a sum over the longest chain of those before it, and a deadlock is a circle.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple


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


# Moments: ("host", rank, place) where the host has done with an item of a program, ("start", rank,
# place) and ("end", rank, place) of its kernel, and ("all", exchanged, number) where all ranks have
# started the kernel that is the `number`-th to exchange this.
_Moment = tuple[str, Any, int]


def makespan(programs: Sequence[Program], *, one_queue: bool, launch_s: float = 0.0) -> float:
    """Return the seconds from the first launch to the end of the last kernel on all ranks.

    Raises:
        Deadlock: with kernels that wait for each other, or that a rank leaves out.
    """
    before: defaultdict[_Moment, set[_Moment]] = defaultdict(set)
    taken_s: dict[_Moment, float] = {}
    for rank, program in enumerate(programs):
        _add(rank, program, one_queue, launch_s, before, taken_s)

    for (of, exchanged, _), starts in before.items():
        if of == "all" and len(starts) < len(before["all", exchanged, 0]):
            raise Deadlock(f"a rank leaves out: {_named(programs, [*starts])}")
    times_s: dict[_Moment, float] = {}
    try:
        for moment in TopologicalSorter(before).static_order():
            latest_s = max((times_s[other] for other in before[moment]), default=0.0)
            times_s[moment] = latest_s + taken_s.get(moment, 0.0)
    except CycleError as circle:
        raise Deadlock(f"wait for each other: {_named(programs, circle.args[1])}") from None
    return max(times_s.values(), default=0.0)


def _add(
    rank: int,
    program: Program,
    one_queue: bool,
    launch_s: float,
    before: defaultdict[_Moment, set[_Moment]],
    taken_s: dict[_Moment, float],
) -> None:
    """Add a rank's moments: those before each, and the seconds that it takes."""
    met = Counter[Hashable]()
    host: set[_Moment] = set()
    last_start: set[_Moment] = set()
    for place, item in enumerate(program):
        ends = {("end", rank, other) for other in item.after}
        done, start, end = (("host", rank, place), ("start", rank, place), ("end", rank, place))
        before[done] |= host
        host = {done}
        if isinstance(item, HostWait):
            before[done] |= ends
            continue
        taken_s[done], taken_s[end] = launch_s, item.seconds
        before[start] |= {done, *ends, *(last_start if one_queue else ())}
        last_start = {start}
        before[end].add(start)
        for exchanged in item.meets:
            before["all", exchanged, met[exchanged]].add(start)
            before[end].add(("all", exchanged, met[exchanged]))
            met[exchanged] += 1


def _named(programs: Sequence[Program], moments: Sequence[_Moment]) -> str:
    starts = [(rank, place) for of, rank, place in moments if of == "start"]
    return ", ".join(
        f"{programs[rank][place].name or 'kernel'}, launch {place} of rank {rank}"  # type: ignore[union-attr]
        for rank, place in starts
    )
