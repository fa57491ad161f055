"""A `Check` is one line of the output of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# Answer of a process of `probes`.
Answer = dict[str, Any]


class Status(StrEnum):
    """Meaning of a check for training; the last two prevent it."""

    OK = "ok"
    OPTIONAL = "optional"
    MISSING = "missing"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Check:
    """Result for one thing that was looked for.

    Attributes:
        found: its version or state.
        note: the way out, or a remark; may be empty.
    """

    name: str
    found: str
    status: Status = Status.OK
    note: str = ""

    @property
    def stops(self) -> bool:
        """Return whether training cannot run with this."""
        return self.status in (Status.MISSING, Status.UNSUPPORTED)

    @property
    def status_and_note(self) -> str:
        """Return the text of the last column."""
        return f"{self.status}: {self.note}" if self.note else str(self.status)
