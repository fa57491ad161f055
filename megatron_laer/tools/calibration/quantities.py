"""Keys of the measured figures; their texts, with units, are the names in a cluster file."""

from __future__ import annotations

from typing import NamedTuple


class Product(NamedTuple):
    """Product of a back end, by the tokens of each slot, in seconds of one slot."""

    back_end: str
    name: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.back_end} {self.name}, tokens {self.tokens}, s"


class AllToAll(NamedTuple):
    """All-to-All over one class of links, by the bytes that a rank sends to all of its peers."""

    link: str
    peers: int
    sent_bytes: int

    def __str__(self) -> str:
        return f"All-to-All {self.link}, peers {self.peers}, {self.sent_bytes} bytes, s"


class Collective(NamedTuple):
    """Another collective over all ranks."""

    name: str
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.name}, {self.num_bytes} bytes, s"


class PlannerCall(NamedTuple):
    """Call into the planner, `gate` or `solve`, by the shape of a layer."""

    name: str
    ranks: int
    capacity: int
    experts: int

    def __str__(self) -> str:
        return f"{self.name}, N {self.ranks}, C {self.capacity}, E {self.experts}, s"


class Contended(NamedTuple):
    """GEMM or exchange, alone or while the other one runs."""

    name: str
    beside: bool

    def __str__(self) -> str:
        return f"{self.name} {'beside the other' if self.beside else 'alone'}, s"


class Launch(NamedTuple):
    """Start of one small kernel."""

    def __str__(self) -> str:
        return "launch, s"


class ExchangedCounts(NamedTuple):
    """Exchange of counts as a layer makes it, up to the counts on the host."""

    experts: int

    def __str__(self) -> str:
        return f"exchange of counts, E {self.experts}, s"


class Copy(NamedTuple):
    """Copy in a rank's memory."""

    num_bytes: int

    def __str__(self) -> str:
        return f"copy of {self.num_bytes} bytes, s"


Quantity = (
    Product | AllToAll | Collective | PlannerCall | Contended | Launch | ExchangedCounts | Copy
)

FORWARD, INPUT_GRAD, WEIGHT_GRAD = "forward", "input_grad", "weight_grad"
PRODUCTS = (FORWARD, INPUT_GRAD, WEIGHT_GRAD)
INTRA, INTER = "intra", "inter"
GATE, SOLVE = "gate", "solve"
GEMM, EXCHANGE = "GEMM", "exchange"
ALL_GATHER, ALL_REDUCE = "All-gather", "All-reduce"
