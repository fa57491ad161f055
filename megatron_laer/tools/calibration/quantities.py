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
class Collective(Quantity):
    """Another collective over all ranks."""

    text = "{name}, {num_bytes} bytes"
    name: str
    num_bytes: int


@dataclass(frozen=True)
class PlannerCall(Quantity):
    """Call into the planner, `gate` or `solve`, by the shape of a layer."""

    text = "{name}, N {ranks}, C {capacity}, E {experts}"
    name: str
    ranks: int
    capacity: int
    experts: int


@dataclass(frozen=True)
class Contended(Quantity):
    """GEMM or exchange, alone or while the other one runs."""

    name: str
    beside: bool

    def __str__(self) -> str:
        return f"{self.name} {'beside the other' if self.beside else 'alone'}, s"


@dataclass(frozen=True)
class Launch(Quantity):
    """Start of one small kernel."""

    text = "launch"


@dataclass(frozen=True)
class ExchangedCounts(Quantity):
    """Exchange of counts as a layer makes it, up to the counts on the host."""

    text = "exchange of counts, E {experts}"
    experts: int


@dataclass(frozen=True)
class Copy(Quantity):
    """Copy in a rank's memory."""

    text = "copy of {num_bytes} bytes"
    num_bytes: int


FORWARD, INPUT_GRAD, WEIGHT_GRAD = "forward", "input_grad", "weight_grad"
PRODUCTS = (FORWARD, INPUT_GRAD, WEIGHT_GRAD)
INTRA, INTER = "intra", "inter"
GATE, SOLVE = "gate", "solve"
GEMM, EXCHANGE = "GEMM", "exchange"
ALL_GATHER, ALL_REDUCE = "All-gather", "All-reduce"
