"""Common parts of benchmarks: printed tables, the machine's name, and times."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laer.files.checks import one_line


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        print(table_text(rows), end="\n\n", flush=True)


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows in columns as wide as their longest cell; None is a dash."""
    header = list(rows[0])
    cells = [[_cell(row[key]) for key in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [header, *cells]
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else one_line(value)


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads_used": 1,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.system(),
    }


def times_ms(run: Callable[[], object], repeats: int) -> list[float]:
    """Return the wall times of calls, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times
