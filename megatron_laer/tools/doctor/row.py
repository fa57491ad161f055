"""A `Row` is one line of what `doctor` prints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# What a probe says, see `probes.py`.
Answer = dict[str, Any]


class Verdict(StrEnum):
    """Says what a row means for training, which the last two stop."""

    OK = "ok"
    OPTIONAL = "optional"
    MISSING = "missing"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Row:
    """Holds one thing that was looked for.

    Attributes:
        name: of the thing.
        found: its version or state.
        verdict: what that means.
        note: what to do, or what is worth knowing; may be empty.
    """

    name: str
    found: str
    verdict: Verdict = Verdict.OK
    note: str = ""

    @property
    def stops(self) -> bool:
        """Whether training cannot run with what was found."""
        return self.verdict in (Verdict.MISSING, Verdict.UNSUPPORTED)

    @property
    def verdict_and_note(self) -> str:
        """Return the text of the last column."""
        return f"{self.verdict}: {self.note}" if self.note else str(self.verdict)
