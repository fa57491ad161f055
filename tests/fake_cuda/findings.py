"""Findings on the labelled device, each with its kind and its place in the code.

Of a CUDA graph's capture there is more: every operation, with the place that called it.
"""

from __future__ import annotations

import sys
from collections import Counter
from enum import StrEnum
from typing import NamedTuple

import torch


class Kind(StrEnum):
    """Kinds of findings; the first two are noted in the steady state only.

    In a capture, these two are of the third kind.
    """

    WAIT = "host wait"
    PAGEABLE = "copy of pageable memory"
    UNRECORDED = "no graph can record it"
    MISMATCH = "memories that do not meet"
    REFUSED = "refused by torch's rules"
    NO_KERNEL = "no kernel for CUDA"
    COLLECTIVE = "collective that NCCL lacks"


WHEN_STEADY = (Kind.WAIT, Kind.PAGEABLE)


class Finding(NamedTuple):
    kind: Kind
    place: str
    what: str


class Findings:
    """Counter of findings.

    Attributes:
        is_steady: whether waits count, which they do not while buffers are made.
        raises: whether operations that wait for the device raise, as in torch's debug mode.
        captured: operations that a graph would record, with their places.
    """

    def __init__(self) -> None:
        self.found = Counter[Finding]()
        self.is_steady = False
        self.raises = False
        self.captured = Counter[tuple[str, str]]()

    def note(self, kind: Kind, what: str) -> None:
        if kind in WHEN_STEADY and torch.cuda.is_current_stream_capturing():
            kind = Kind.UNRECORDED
        if self.is_steady or kind not in WHEN_STEADY:
            self.found[Finding(kind, place(), what)] += 1

    def ran(self, operation: str) -> None:
        if torch.cuda.is_current_stream_capturing():
            self.captured[operation, place()] += 1


current = Findings()


def renew() -> Findings:
    global current
    current = Findings()
    return current


_ROOTS = ("/megatron_laer/", "/megatron/", "/tests/")
# Files whose callers are the place.
_BELOW = (
    *(f"tests/fake_cuda/{name}.py" for name in ("findings", "names", "oracle", "streams")),
    *("tests/fake_cuda/kernels.py", "tests/fake_cuda/observing.py", "tests/fake_cuda/clocks.py"),
    *("megatron_laer/cpu/cuda.py", "tests/one_layer.py"),
)


def place() -> str:
    """Return the file and function, of this package, Megatron or tests, that runs now."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        for root in _ROOTS:
            if root in file:
                named = root.strip("/") + "/" + file.rpartition(root)[2]
                if named not in _BELOW:
                    return f"{named}:{frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
