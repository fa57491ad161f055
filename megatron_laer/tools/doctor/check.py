"""One line of the output of `doctor`."""

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
    """Result of one check: the version or state found, and a remedy or remark (may be empty)."""

    name: str
    found: str
    status: Status = Status.OK
    note: str = ""

    @property
    def stops(self) -> bool:
        """Return True if training cannot run with this."""
        return self.status in (Status.MISSING, Status.UNSUPPORTED)

    @property
    def status_and_note(self) -> str:
        return f"{self.status}: {self.note}" if self.note else str(self.status)
