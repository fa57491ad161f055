"""These values hold a cluster's hardware constants for the cost model, and how far they are known.

`cluster_files` reads and writes them, `costs` says what they make of a layout, and the command
`calibrate` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_laer.planner.gemm_curve import GemmCurve


# First, since a default below is checked as this module is imported.
def _check_rate(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}")


def _check_seconds(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def _check_factor(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


@dataclass(frozen=True)
class Link:
    """Speed at which one rank sends and, at the same time, receives over one class of links.

    Attributes:
        bytes_per_s: per rank and direction; infinite makes transfers free.
        latency_s: of one collective, whatever its size.
        peer_s: more for each rank that a rank exchanges with over these links.

    Raises:
        ValueError: a rate that is not positive, or a time that is negative or not finite.
    """

    bytes_per_s: float
    latency_s: float
    peer_s: float = 0.0

    def __post_init__(self) -> None:
        _check_rate("bytes_per_s", self.bytes_per_s)
        _check_seconds("latency_s", self.latency_s)
        _check_seconds("peer_s", self.peer_s)


@dataclass(frozen=True)
class SolveTime:
    """Time of a call into the planner on one core: linear in slots and counts.

    Attributes:
        base_s: of any call.
        slot_s: more per slot, N*C.
        count_s: more per count, N*E.

    Raises:
        ValueError: a time that is negative or not finite.
    """

    base_s: float
    slot_s: float
    count_s: float

    def __post_init__(self) -> None:
        for name in ("base_s", "slot_s", "count_s"):
            _check_seconds(name, getattr(self, name))

    def seconds(self, num_ranks: int, capacity: int, num_experts: int) -> float:
        """Return the seconds for N ranks, C slots each, E experts."""
        slots, counts = num_ranks * capacity, num_ranks * num_experts
        return self.base_s + slots * self.slot_s + counts * self.count_s

    def times(self, factor: float) -> SolveTime:
        """Return the times of a host that takes this many times as long."""
        return SolveTime(self.base_s * factor, self.slot_s * factor, self.count_s * factor)


@dataclass(frozen=True)
class HostTime:
    """Time that a rank's host adds to each microbatch of a layer.

    Attributes:
        launch_s: of starting one kernel.
        gate: from counts that have arrived to one rank's quotas under the planned layout, with the
            copies of counts to the host; a fresh layout comes on top (`Cluster.solve`).

    Raises:
        ValueError: a time that is negative or not finite.
    """

    launch_s: float
    gate: SolveTime

    def __post_init__(self) -> None:
        _check_seconds("launch_s", self.launch_s)


@dataclass(frozen=True)
class Contention:
    """Factors on the times of a GEMM and an exchange that run at the same time.

    Raises:
        ValueError: a factor that is not positive and finite.
    """

    gemm: float = 1.0
    exchange: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gemm", "exchange"):
            _check_factor(name, getattr(self, name))


# Of a slot, for GEMMs that count in a layer's time.
ENOUGH_TOKENS = 64


@dataclass(frozen=True)
class BackEnd:
    """Speed of one back end of the experts' GEMMs, as `--fsep-gemm` names it.

    Attributes:
        forward, input_grad, weight_grad: its three products, by the tokens of a slot.
    """

    name: str
    forward: GemmCurve
    input_grad: GemmCurve
    weight_grad: GemmCurve

    @property
    def backward_gemm_factor(self) -> float:
        """Return the time of a GEMM in backward over one in forward, the median of the points.

        Of points with `ENOUGH_TOKENS`, if there are any: few tokens have other ratios and next to
        no share of a layer's time.
        """
        tokens_P = np.array([tokens for tokens, _ in self.forward.points])
        tokens_P = tokens_P[tokens_P >= min(ENOUGH_TOKENS, tokens_P[-1])]
        backward_P = self.input_grad.unit_seconds(tokens_P) + self.weight_grad.unit_seconds(
            tokens_P
        )
        return float(np.median(backward_P / (2.0 * self.forward.unit_seconds(tokens_P))))


@dataclass(frozen=True)
class Spread:
    """Range of a constant, and its source.

    Attributes:
        low, high: of the constant; for a constant that is a curve or a sum of terms (`gemm`,
            `solve`, `host.gate`), of a factor on it.
        source: of the constant and its range.

    Raises:
        ValueError: a range that is none, or no source.
    """

    low: float
    high: float
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < math.inf:
            raise ValueError(f"low {self.low:g} and high {self.high:g} are no range")


@dataclass(frozen=True)
class Figure:
    """Measured figure: the median, the 10th and the 90th percentile."""

    median: float
    low: float
    high: float


# What a spread may name. A rate is faster when it is higher, all others when they are lower.
_FACTORS = ("gemm", "solve", "host.gate")
_RATES = ("gemm", "memory_bytes_per_s", "intra.bytes_per_s", "inter.bytes_per_s")
_POSITIVE = (*_RATES, "backward_gemm_factor", "contention.gemm", "contention.exchange")
CONSTANTS = (
    *("gemm", "backward_gemm_factor", "memory_bytes_per_s", "solve"),
    *(f"{link}.{name}" for link in ("intra", "inter") for name in Link.__match_args__),
    *("host.launch_s", "host.gate", "contention.gemm", "contention.exchange"),
)


@dataclass(frozen=True)
class Cluster:
    """Hardware constants of a cluster and their origin, as in `configs/clusters/*.yaml`.

    Attributes:
        name: of the hardware; for the files we ship, also the name of the file.
        source: who measured or published the numbers, and how.
        assumed: which of them nobody did, and what they rest on; "nothing" if there are none.
        nodes: number of nodes.
        ranks_per_node: G.
        gemm: speed of one rank in the experts' GEMMs of forward.
        intra: links inside a node.
        inter: links between nodes; the share of one rank, not the node's total.
        solve: of the guard's fresh layout.
        backward_gemm_factor: the time of a GEMM of backward over that of one in forward with as
            many FLOPs.
        host: None where nobody measured it; it is counted as nothing then.
        contention: of an exchange beside a GEMM.
        memory_bytes_per_s: what one rank reads and writes of its memory; None as for `host`.
        back_ends: those that were measured; `gemm` and `backward_gemm_factor` are the default's.
        spreads: by the names in `CONSTANTS`, of as many as are known.
        figures: all that was measured; each name ends in its unit.
        measured: where and with what, as pairs of texts.

    Raises:
        ValueError: a constant that is out of range, or outside of its own spread.
    """

    name: str
    source: str
    assumed: str
    nodes: int
    ranks_per_node: int
    gemm: GemmCurve
    intra: Link
    inter: Link
    solve: SolveTime
    backward_gemm_factor: float = 1.0
    host: HostTime | None = None
    contention: Contention = Contention()
    memory_bytes_per_s: float | None = None
    back_ends: tuple[BackEnd, ...] = ()
    spreads: tuple[tuple[str, Spread], ...] = ()
    figures: tuple[tuple[str, Figure], ...] = ()
    measured: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check_factor("backward_gemm_factor", self.backward_gemm_factor)
        if self.memory_bytes_per_s is not None:
            _check_rate("memory_bytes_per_s", self.memory_bytes_per_s)
        for name, spread in self.spreads:
            value = self.constant(name)
            if value is None:
                raise ValueError(
                    f"spreads has {name}, which is not given; give it, or leave it out"
                )
            if not spread.low <= value <= spread.high:
                raise ValueError(
                    f"{name} is {value:g}, outside of its spread {spread.low:g}..{spread.high:g}"
                )
            if spread.low == 0 and name in _POSITIVE:
                raise ValueError(f"{name} has a spread from 0, but must be positive")

    def collective_seconds(self, intra_peers: int, inter_peers: int) -> float:
        """Return the latency of one collective: of the slowest links it spans, and of its peers."""
        intra, inter = self.intra, self.inter
        slowest_s = inter.latency_s if inter_peers else intra.latency_s if intra_peers else 0.0
        return slowest_s + (intra_peers * intra.peer_s + inter_peers * inter.peer_s)

    def constant(self, name: str) -> float | None:
        """Return one of `CONSTANTS`; 1 for those whose spread is a factor; None if not given."""
        if name not in CONSTANTS:
            raise ValueError(f"{name!r} is no constant with a spread; known are {list(CONSTANTS)}")
        value: Any = self
        for part in name.split("."):
            value = None if value is None else getattr(value, part)
        if value is None:
            return None
        return 1.0 if name in _FACTORS else float(value)

    def with_constants(self, values: Mapping[str, float]) -> Cluster:
        """Return the cluster with other values of `CONSTANTS`, and without spreads."""
        found = replace(self, spreads=())
        for name, value in values.items():
            if found.constant(name) is None:
                raise ValueError(f"{name} is not given for {self.name}, so it cannot be varied")
            found = _changed(found, name.split("."), value, name in _FACTORS)
        return found

    def for_back_end(self, name: str) -> Cluster:
        """Return the cluster with this back end's GEMMs if they were measured; else itself."""
        for back_end in self.back_ends:
            if back_end.name == name:
                factor = back_end.backward_gemm_factor
                spreads = tuple(
                    (constant, spread)
                    for constant, spread in self.spreads
                    if constant not in ("gemm", "backward_gemm_factor")
                )
                return replace(
                    self, gemm=back_end.forward, backward_gemm_factor=factor, spreads=spreads
                )
        return self


def _changed(owner: Any, path: Sequence[str], value: float, is_factor: bool) -> Any:
    """Return a dataclass with another value, or another multiple of it, at a path of fields."""
    old = getattr(owner, path[0])
    if len(path) > 1:
        return replace(owner, **{path[0]: _changed(old, path[1:], value, is_factor)})
    return replace(owner, **{path[0]: old.times(value) if is_factor else value})
