"""Memory is asked for before it is taken: how much this process may still take.

Linux rarely refuses memory: it ends a process when there is none left.
"""

from __future__ import annotations

from pathlib import Path

import psutil

_GIB = 2**30
# Of the second version, as the process sees its own group in a container.
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the bytes that the machine has free, or this container or job may take, if fewer."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit
        return free
    return min(free, max(limit - used, 0))


def check_enough(needed_bytes: int, purpose: str, remedy: str) -> None:
    """Refuse work that would take more memory than is there.

    Args:
        purpose: what takes the memory, as the begin of a sentence.
        remedy: what to do instead.
    """
    there = available_bytes()
    if needed_bytes > there:
        raise ValueError(
            f"{purpose} would take about {needed_bytes / _GIB:,.1f} GiB of memory, "
            f"{there / _GIB:,.1f} GiB are free here; {remedy}"
        )
