"""Hardware constants of a cluster for the cost model, and their spreads.

`cluster_files` reads and writes them, `costs` applies them, and the command `calibrate` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_laer.choices import GemmBackEnd
from megatron_laer.planner.gemm_curve import GemmCurve
from megatron_laer.precision import Precision


# First in the file, since the import checks a default below.
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
    """Speed of one class of links, over which a rank sends and receives at the same time.

    Attributes:
        bytes_per_s: rate per rank and direction; infinite makes transfers free.
        latency_s: time of one collective of any size.
        peer_s: additional time per peer of a rank over these links.
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
    """Time of a planner call on one core: a base, and more per slot (N*C) and count (N*E)."""

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
        """Return the times of a host that is slower by this factor."""
        return SolveTime(self.base_s * factor, self.slot_s * factor, self.count_s * factor)


# Operations of a layer in forward and backward: without experts, more with them, and of each slot.
# All but the first were counted (`python -m benchmarks.launches`).
DENSE_OPERATIONS, MOE_OPERATIONS, SLOT_OPERATIONS = 75, 85, 10
# Launches that take the host as long as one of these, in Python with autograd: from one published
# time, in which the host is slower than the device (docs/predict.md).
_OPERATION_LAUNCHES = 7.3


@dataclass(frozen=True)
class HostTime:
    """Time that a rank's host adds to each microbatch of a layer.

    Attributes:
        launch_s: time to start one kernel.
        gate: time from counts to quotas of the planned layout, with copies of counts to the host. A
            fresh layout comes on top (`Cluster.solve`).
        replicas_s: time of a layer's forward for experts that are fetched (of any number):
            rows, or replicas next to home experts.
    """

    launch_s: float
    gate: SolveTime
    replicas_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("launch_s", "replicas_s"):
            _check_seconds(name, getattr(self, name))

    def forward_seconds(self, operations: float) -> float:
        """Return the time of forward's part of a layer's operations, a third."""
        return operations / 3 * _OPERATION_LAUNCHES * self.launch_s


# NCCL's MAXCHANNELS, which also bounds its thread blocks.
_MOST_CHANNELS = 64


def _check_channels(name: str, value: int) -> None:
    if not 1 <= value <= _MOST_CHANNELS:
        raise ValueError(f"{name} must be in 1..{_MOST_CHANNELS}, NCCL's most, got {value!r}")


@dataclass(frozen=True)
class ExchangeCtas:
    """Most thread blocks of NCCL, hence SMs, of an exchange of weights or gradients.

    Attributes:
        intra: of a communicator inside a node.
        inter: of one between nodes, whose links need fewer.
    """

    intra: int
    inter: int

    def __post_init__(self) -> None:
        for name in ("intra", "inter"):
            _check_channels(name, getattr(self, name))

    def of(self, *, crosses_nodes: bool) -> int:
        return self.inter if crosses_nodes else self.intra


@dataclass(frozen=True)
class Card:
    """Memory of one rank's card, and of libraries on it.

    Attributes:
        memory_gib: GiB of the whole card.
        context_gib: GiB of CUDA's context and libraries.
        nccl_channels: channels of an NCCL communicator, in all and per peer, for its buffers.
        exchange_ctas: default of communicators of weights and gradients; None leaves it to NCCL.
    """

    memory_gib: float
    context_gib: float
    nccl_channels: int
    exchange_ctas: ExchangeCtas | None = None

    def __post_init__(self) -> None:
        _check_rate("memory_gib", self.memory_gib)
        if not 0 <= self.context_gib < self.memory_gib:
            raise ValueError(
                f"context_gib must be less than memory_gib {self.memory_gib:g}, and at least 0, "
                f"got {self.context_gib!r}"
            )
        _check_channels("nccl_channels", self.nccl_channels)

    def communicator_bytes(self, ranks: int, node_size: int, *, of_exchange: bool = False) -> int:
        """Estimate the buffers of one NCCL communicator (docs/internals/communication.md)."""
        if ranks == 1:
            return 0
        peers, crosses_nodes = min(ranks, node_size) - 1, ranks > node_size
        channels = self.nccl_channels
        if of_exchange and self.exchange_ctas is not None:
            channels = min(channels, self.exchange_ctas.of(crosses_nodes=crosses_nodes))
        mebibytes = peers * channels * 12 + crosses_nodes * channels * 4
        return mebibytes * 2**20


@dataclass(frozen=True)
class Contention:
    """Factors on the times of a GEMM and an exchange that run at the same time."""

    gemm: float = 1.0
    exchange: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gemm", "exchange"):
            _check_factor(name, getattr(self, name))


# Passes over exchanged weights: the sender packs them and the receiver unpacks, a read and a write.
PACKING_PASSES = 4
# Tokens per slot from which a GEMM matters in a layer's time.
ENOUGH_TOKENS = 64


@dataclass(frozen=True)
class BackEnd:
    """Speed of one back end's three GEMMs by tokens per slot; named as in `--fsep-set gemm`."""

    name: str
    forward: GemmCurve
    input_grad: GemmCurve
    weight_grad: GemmCurve

    def __post_init__(self) -> None:
        if self.name not in GemmBackEnd:
            raise ValueError(f"{self.name!r} is no back end; known are {', '.join(GemmBackEnd)}")

    @property
    def backward_gemm_factor(self) -> float:
        """Return the median ratio of a backward GEMM's time to a forward one's.

        Only points with `ENOUGH_TOKENS` count, if there are any. Few tokens have other ratios and a
        negligible share of a layer's time.
        """
        tokens_P = np.array([tokens for tokens, _ in self.forward.points])
        tokens_P = tokens_P[tokens_P >= min(ENOUGH_TOKENS, tokens_P[-1])]
        backward_P = self.input_grad.unit_seconds(tokens_P) + self.weight_grad.unit_seconds(
            tokens_P
        )
        return float(np.median(backward_P / (2.0 * self.forward.unit_seconds(tokens_P))))


@dataclass(frozen=True)
class Spread:
    """Range of a constant, or of a factor on it (`gemm`, `solve`, `host.gate`), and its source."""

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


# Constants that a spread may name. Rates are faster if higher, all others if lower.
_FACTORS = ("gemm", "solve", "host.gate")
_RATES = ("gemm", "memory_bytes_per_s", "intra.bytes_per_s", "inter.bytes_per_s")
_POSITIVE = (*_RATES, "backward_gemm_factor", "contention.gemm", "contention.exchange")
CONSTANTS = (
    *("gemm", "backward_gemm_factor", "memory_bytes_per_s", "solve"),
    *(f"{link}.{name}" for link in ("intra", "inter") for name in Link.__match_args__),
    *("host.launch_s", "host.gate", "host.replicas_s"),
    *("contention.gemm", "contention.exchange"),
)


@dataclass(frozen=True)
class Cluster:
    """Hardware constants of a cluster and their origin, as in `configs/clusters/*.yaml`.

    Attributes:
        name: name of the hardware; for shipped files, also of the file.
        source: origin of the numbers, with the method.
        assumed: constants without measurement or publication, and their basis; "nothing" if none.
        gemm: speed of one rank in the experts' GEMMs of forward.
        gemm_fp8: the same in fp8; None where the hardware has none, or its speed is not known.
        intra, inter: links inside a node and between nodes, as the share of one rank.
        solve: time of the guard's fresh layout.
        backward_gemm_factor: time of a backward GEMM relative to a forward one with as many FLOPs.
        host: None if not measured, and then counted as zero.
        memory_bytes_per_s: one rank's rate of reads and writes; None if not measured.
        card: None for ranks on CPUs.
        back_ends: measured ones; `gemm` and `backward_gemm_factor` are the default's.
        spreads: known spreads by the names in `CONSTANTS`.
        figures: all measured figures; each name ends in its unit.
        measured: place and tools of the measurement, as pairs of texts.
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
    gemm_fp8: GemmCurve | None = None
    host: HostTime | None = None
    contention: Contention = Contention()
    memory_bytes_per_s: float | None = None
    card: Card | None = None
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
        """Return the latency of one collective: of its slowest links, and of its peers."""
        intra, inter = self.intra, self.inter
        slowest_s = inter.latency_s if inter_peers else intra.latency_s if intra_peers else 0.0
        return slowest_s + (intra_peers * intra.peer_s + inter_peers * inter.peer_s)

    def memory_rate(self, bytes_per_element: int) -> float:
        """Return the measured rate of memory, else that of reading the smallest GEMM's weights.

        A GEMM reads each weight once, for two FLOPs of a token.
        """
        if self.memory_bytes_per_s is not None:
            return self.memory_bytes_per_s
        tokens, speed = self.gemm.points[0]
        return speed / tokens * bytes_per_element / 2

    def gemm_in(self, precision: Precision) -> GemmCurve:
        """Return the speed of GEMMs; raise ValueError if it is not known."""
        if not precision.is_quantised:
            return self.gemm
        if self.gemm_fp8 is None:
            raise ValueError(
                f"cluster {self.name} has no speed of GEMMs in fp8 (gemm_fp8; A100 computes none): "
                "take another cluster, add it to the file, or leave out --fp8-format"
            )
        return self.gemm_fp8

    def exchange_rates(
        self, bytes_per_element: int, quantising_passes: float = 0.0
    ) -> tuple[float, float]:
        """Return the bytes per second of weights inside nodes and between, with their packing.

        `bytes_per_element` are those of GEMMs, for `memory_rate`.
        """
        packing = (PACKING_PASSES + quantising_passes) / self.memory_rate(bytes_per_element)
        intra, inter = (
            1.0 / (1.0 / link.bytes_per_s + packing) for link in (self.intra, self.inter)
        )
        return intra, inter

    def constant(self, name: str) -> float | None:
        """Return one of `CONSTANTS`: 1 if its spread is a factor, None if it is not given."""
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
            if name == "gemm" and found.gemm_fp8 is not None:
                found = replace(found, gemm_fp8=found.gemm_fp8.times(value))
        return found

    def for_back_end(self, name: str) -> Cluster:
        """Return the cluster with this back end's GEMMs, or unchanged if they were not measured."""
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
    """Return a copy with another value, or another multiple of it, at a path of fields."""
    old = getattr(owner, path[0])
    if len(path) > 1:
        return replace(owner, **{path[0]: _changed(old, path[1:], value, is_factor)})
    return replace(owner, **{path[0]: old.times(value) if is_factor else value})
