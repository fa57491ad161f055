"""What a rank tells of a run that the checker watched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Watched:
    """What the checker saw of a run."""

    races: list[str]
    operations: int
    frees: int
