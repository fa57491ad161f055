"""The cost model's hardware constants are read from a cluster's YAML file here.

What they make of a layout is in `costs`. Nothing here measures.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.yaml_text import parse_yaml, read_yaml

_Float64 = npt.NDArray[np.float64]

# Of constants in files: far beyond any machine, and far from where sums of times overflow.
_LEAST_RATE, _MOST_RATE = 1.0, 1e24
_MOST_SECONDS = 3600.0


@dataclass(frozen=True)
class GemmCurve:
    """Tells how fast one rank multiplies, by the tokens in one GEMM.

    Attributes:
        points: (tokens, achieved FLOP/s), with more tokens and no less time from each to the next.

    Raises:
        ValueError: no points, tokens that do not increase, a speed that is not positive, or more
            tokens in less time.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a GEMM curve needs at least one point [tokens, FLOP/s], got none")
        for tokens, flops_per_s in self.points:
            if tokens < 1 or not 0 < flops_per_s < math.inf:
                raise ValueError(
                    f"GEMM point [{tokens}, {flops_per_s}]: tokens must be at least 1 and FLOP/s "
                    "positive and finite"
                )
        for (fewer, slow), (more, fast) in pairwise(self.points):
            if more <= fewer:
                raise ValueError(
                    f"GEMM points must have increasing tokens, got {more} after {fewer}"
                )
            if more / fast < fewer / slow:
                raise ValueError(
                    f"GEMM points [{fewer}, {slow}] and [{more}, {fast}] take less time for more "
                    f"tokens; at {more} tokens at most {more * slow / fewer:.3e} FLOP/s fit"
                )

    def unit_seconds(self, tokens: Int64) -> npt.NDArray[np.float64]:
        """Return the seconds of GEMMs that need one FLOP per token; multiply by what yours need.

        Linear in time between points, and beyond the last one at its speed; below the first one as
        long as there; none without tokens. Never less for more tokens. Element by element, so equal
        on every machine.
        """
        tokens_P, seconds_P, slope_P, limit_P = self._table
        point = np.maximum(np.searchsorted(tokens_P, tokens, side="right") - 1, 0)
        above = np.maximum(tokens - tokens_P[point], 0)
        seconds = np.minimum(seconds_P[point] + above * slope_P[point], limit_P[point])
        return np.where(tokens > 0, seconds, 0.0)

    def least_unit_seconds(self, tokens: Int64) -> npt.NDArray[np.float64]:
        """Return what these tokens need at least, however they are divided into GEMMs.

        At the highest speed that as many or fewer tokens reach. Between points speed is monotone,
        since time is linear there, so that is the speed of a point below, or theirs in one GEMM.
        """
        tokens_P, _, _, _ = self._table
        point = np.searchsorted(tokens_P, tokens, side="right")
        at_best = np.where(point > 0, tokens / self._best_P[np.maximum(point - 1, 0)], math.inf)
        return np.minimum(self.unit_seconds(tokens), at_best)

    def columns(self) -> tuple[Int64, _Float64, _Float64, _Float64, _Float64]:
        """Return what both methods look up, by point, for the native cost model."""
        return (*self._table, self._best_P)

    @cached_property
    def _best_P(self) -> _Float64:
        """Return the highest speed up to each point."""
        return np.maximum.accumulate([flops_per_s for _, flops_per_s in self.points])

    @cached_property
    def _table(self) -> tuple[Int64, _Float64, _Float64, _Float64]:
        """Return by point: tokens, seconds, seconds per token beyond, seconds at the next one."""
        tokens_P = np.array([tokens for tokens, _ in self.points], dtype=np.int64)
        seconds_P = np.array([tokens / speed for tokens, speed in self.points])
        slope_P = np.empty_like(seconds_P)
        slope_P[:-1] = (seconds_P[1:] - seconds_P[:-1]) / (tokens_P[1:] - tokens_P[:-1])
        slope_P[-1] = 1.0 / self.points[-1][1]
        return tokens_P, seconds_P, slope_P, np.append(seconds_P[1:], math.inf)


@dataclass(frozen=True)
class Link:
    """Tells what one rank sends and, at the same time, receives over one class of links.

    Attributes:
        bytes_per_s: per rank and direction; infinite makes transfers free.
        latency_s: of one collective, whatever its size.

    Raises:
        ValueError: a rate that is not positive, or a latency that is negative or not finite.
    """

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be positive, got {self.bytes_per_s!r}")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"latency_s must be finite and not negative, got {self.latency_s!r}")


@dataclass(frozen=True)
class SolveTime:
    """Gives the time of a fresh layout and its quotas on one core: linear in slots and counts.

    Attributes:
        base_s: of any solve.
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
            if not 0 <= getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")

    def seconds(self, num_ranks: int, capacity: int, num_experts: int) -> float:
        """Return the seconds for N ranks, C slots each, E experts."""
        slots, counts = num_ranks * capacity, num_ranks * num_experts
        return self.base_s + slots * self.slot_s + counts * self.count_s


@dataclass(frozen=True)
class Cluster:
    """Holds a cluster's hardware constants, as `configs/clusters/*.yaml` does, with their origin.

    Attributes:
        name: of the hardware; for the files we ship, also the name of the file.
        source: who measured or published the numbers, and how.
        assumed: which of them nobody did, and what they rest on; "nothing" if there are none.
        nodes: number of nodes.
        ranks_per_node: G.
        gemm: speed of one rank in the experts' GEMMs.
        intra: links inside a node.
        inter: links between nodes; the share of one rank, not the node's total.
        solve: of the guard's fresh layout.
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


def load_cluster(path_or_name: str | Path) -> Cluster:
    """Read a cluster's constants, by path to a YAML file or by the name of one we ship.

    Raises:
        ValueError: an unknown name, or a file whose content does not fit; the message says what
            would.
        OSError: a path that cannot be read.
    """
    path = yaml_file("cluster", path_or_name)
    content = read_yaml(path)
    try:
        return _cluster(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_cluster(text: str) -> Cluster:
    """Make a cluster from the text of its YAML file.

    Raises:
        ValueError: whatever is wrong with it.
    """
    return _cluster(parse_yaml(text))


def _cluster(content: object) -> Cluster:
    return _Fields(content, "").build(
        Cluster,
        name=_text,
        source=_text,
        assumed=_text,
        nodes=_count,
        ranks_per_node=_count,
        gemm=_gemm,
        intra=_link,
        inter=_link,
        solve=_solve,
    )


class _Fields:
    """Reads a mapping of a YAML file key by key, with errors that say where.

    Raises:
        ValueError: not a mapping.
    """

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{where or 'the file'} holds {_quote(content)}, expected a mapping of keys"
            )
        self._content = content
        self._where = where

    def build[T](self, make: Callable[..., T], **readers: Callable[[object, str], Any]) -> T:
        """Call `make` with one argument per key, each read by its reader.

        Raises:
            ValueError: missing or unknown keys, or a value that does not fit.
        """
        missing = [key for key in readers if key not in self._content]
        unknown = [key for key in self._content if key not in readers]
        if missing or unknown:
            raise ValueError(
                f"{self._where or 'the file'} lacks the keys {missing} and has the unknown keys "
                f"{_quote(unknown)}; expected exactly {list(readers)}"
            )
        prefix = f"{self._where}." if self._where else ""
        values = {
            key: reader(self._content[key], f"{prefix}{key}") for key, reader in readers.items()
        }
        try:
            return make(**values)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}" if self._where else str(error)) from error


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be a text that is not empty, got {_quote(value)}")
    return value


def _count(value: object, where: str) -> int:
    # Not int(): that takes blanks, underscores and digits of other scripts too.
    if not isinstance(value, str) or not (value.isascii() and value.isdigit() and len(value) < 19):
        raise ValueError(f"{where} must be an integer of at least 1, got {_quote(value)}")
    if int(value) < 1:
        raise ValueError(f"{where} must be an integer of at least 1, got {_quote(value)}")
    return int(value)


def _number(value: object, where: str) -> float:
    try:
        number = float(value) if isinstance(value, str) and "_" not in value else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a number like 2.37e+14, got {_quote(value)}")
    return number


def _rate(value: object, where: str) -> float:
    number = _number(value, where)
    # What is not positive is told by the classes, which take infinite rates as well.
    if 0 < number < _LEAST_RATE or number > _MOST_RATE:
        raise ValueError(
            f"{where} must be in {_LEAST_RATE:g}..{_MOST_RATE:g} per second, got {_quote(value)}"
        )
    return number


def _seconds(value: object, where: str) -> float:
    number = _number(value, where)
    if number > _MOST_SECONDS:
        raise ValueError(f"{where} must be at most {_MOST_SECONDS:g} s, got {_quote(value)}")
    return number


def _gemm(value: object, where: str) -> GemmCurve:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where} must be a list of points [tokens, FLOP/s], got {_quote(value)}")
    points = []
    for number, point in enumerate(value):
        if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
            raise ValueError(
                f"{where}[{number}] must be a point [tokens, FLOP/s], got {_quote(point)}"
            )
        points.append(
            (_count(point[0], f"{where}[{number}] tokens"), _rate(point[1], f"{where}[{number}]"))
        )
    try:
        return GemmCurve(tuple(points))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _link(value: object, where: str) -> Link:
    return _Fields(value, where).build(Link, bytes_per_s=_rate, latency_s=_seconds)


def _solve(value: object, where: str) -> SolveTime:
    return _Fields(value, where).build(
        SolveTime, base_s=_seconds, slot_s=_seconds, count_s=_seconds
    )


def _quote(value: object) -> str:
    """Quote a value for a message, cut short."""
    return reprlib.repr(value)
