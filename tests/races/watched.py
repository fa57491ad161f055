"""Report of a rank on a run that the checker watched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Watched:
    """The checker's findings of a run."""

    races: list[str]
    operations: int
    frees: int
