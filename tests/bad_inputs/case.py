"""A `Case` is one command line that cannot work, or that must not do harm."""

from __future__ import annotations

from dataclasses import dataclass, field

_COMMANDS = (
    *("plan", "flags", "inspect", "prepare-data", "check-recipe", "report", "train"),
    *("doctor", "calibrate", "simulate", "advise"),
)


@dataclass(frozen=True)
class Case:
    """One bad input, with a part of the message that quotes it and the command's status.

    The status is 0 where the input is odd and still works. With `prints`, possible results are
    printed all the same. Cases that are `nightly` are many and similar.
    """

    words: tuple[str, ...]
    says: str
    environment: dict[str, str] = field(default_factory=dict)
    status: int = 2
    prints: bool = False
    nightly: bool = False

    @property
    def command(self) -> str:
        first = self.words[0] if self.words else ""
        if first.endswith((".py", ".sbatch")):
            return " ".join(first.split("/")[:-1]) or first
        return first if first in _COMMANDS else "command line"

    @property
    def key(self) -> tuple[object, ...]:
        return self.words, tuple(sorted(self.environment.items()))
