"""Tables of the paper's numbers next to ours, kept as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import machine, table_text
from megatron_laer.files.checks import one_line
from megatron_laer.files.writing import write_file


@dataclass(frozen=True)
class Table:
    """Rows with the same columns; None is unmeasured, unpublished or without a counterpart.

    Columns of the paper's numbers start with `paper`; the other numbers are ours.
    """

    title: str
    rows: Sequence[dict[str, Any]]


@dataclass
class Result:
    """Result of a figure's command.

    `scale` is `toy`, `slurm`, `here` or `simulated`. `notes` are sentences on missing parts.
    """

    figure: int
    title: str
    scale: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        parts = [f"Figure {self.figure}. {self.title} ({self.scale})"]
        parts += [f"{table.title}\n{table_text(table.rows)}" for table in self.tables]
        parts += ["\n".join(f"* {one_line(note)}" for note in self.notes)] if self.notes else []
        return "\n\n".join(parts)

    def write(self, folder: Path) -> Path:
        """Write `result.txt` and `result.json`, with this machine's name; return the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "result.json"
        for there, content in (
            (folder / "result.txt", self.text()),
            (path, json.dumps(asdict(self) | {"machine": machine()}, indent=1)),
        ):
            # Replace the file instead of writing into it, since it may have hard links.
            write_file(there, f"{content}\n")
        return path


def times(
    paper_s: float | None, paper_base_s: float | None, ours_s: float | None, base_s: float | None
) -> dict[str, float | None]:
    """Make columns of seconds per step, and of speed relative to a base."""
    return {
        "paper s": paper_s,
        "s": ours_s,
        "paper speed": ratio(paper_base_s, paper_s),
        "speed": ratio(base_s, ours_s),
    }


def ratio(one: float | None, other: float | None) -> float | None:
    """Divide two numbers; None if either is missing."""
    return None if one is None or other is None else one / other
