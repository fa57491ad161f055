"""Available memory, checked before large allocations: Linux kills processes when none is left."""

from __future__ import annotations

from pathlib import Path

import psutil

_GIB = 2**30
# Version 2, as a process in a container sees its own group.
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the free bytes of the machine, or of this container's or job's limit, if fewer."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit
        return free
    return min(free, max(limit - used, 0))


def check_enough(needed_bytes: int, purpose: str, remedy: str) -> None:
    """Refuse work that would take more memory than is available; `purpose` starts the message."""
    there = available_bytes()
    if needed_bytes > there:
        raise ValueError(
            f"{purpose} would take about {needed_bytes / _GIB:,.1f} GiB of memory, "
            f"{there / _GIB:,.1f} GiB are free here; {remedy}"
        )
