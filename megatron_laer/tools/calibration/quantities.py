"""Keys of the measured figures; their texts, with units, are the names in a cluster file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Quantity:
    """Key of a measured figure, in seconds."""

    text: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.text.format_map(vars(self))}, s"


@dataclass(frozen=True)
class Product(Quantity):
    """Product of a back end, by the tokens of each slot, in seconds of one slot."""

    text = "{back_end} {name}, tokens {tokens}"
    back_end: str
    name: str
    tokens: int


@dataclass(frozen=True)
class AllToAll(Quantity):
    """All-to-All over one class of links, by the bytes that a rank sends to all of its peers."""

    text = "All-to-All {link}, peers {peers}, {sent_bytes} bytes"
    link: str
    peers: int
    sent_bytes: int


@dataclass(frozen=True)
class PlannerCall(Quantity):
    """Call into the planner, `gate` or `solve`, by the shape of a layer."""

    text = "{name}, N {ranks}, C {capacity}, E {experts}"
    name: str
    ranks: int
    capacity: int
    experts: int


@dataclass(frozen=True)
class Single(Quantity):
    """Quantity of at most one size, by a text below."""

    name: str
    size: int = 0

    def __str__(self) -> str:
        return f"{self.name.format(size=self.size)}, s"


FORWARD, INPUT_GRAD, WEIGHT_GRAD = "forward", "input_grad", "weight_grad"
PRODUCTS = (FORWARD, INPUT_GRAD, WEIGHT_GRAD)
INTRA, INTER = "intra", "inter"
GATE, SOLVE = "gate", "solve"
# One small kernel, and a copy in a rank's memory.
LAUNCH, COPY = "launch", "copy of {size} bytes"
# Collectives over all ranks; the second one is a layer's, up to the counts on the host.
ALL_GATHER, COUNTS = "All-gather, {size} bytes", "exchange of counts, E {size}"
# Each alone, and while the other one runs.
GEMM, EXCHANGE = "GEMM", "exchange"
ALONE, BESIDE = "{} alone", "{} beside the other"
