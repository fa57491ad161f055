"""Figures of a GPU check that matter most, in the order of reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu import overlap

Rows = list[dict[str, Any]]


class Figure(NamedTuple):
    """Name of a figure, the start of its table's title, and its value from the table's rows."""

    name: str
    title: str
    value: Callable[[Rows], object]


def _of(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _mean(rows: Rows, column: str) -> float:
    values = [row[column] for row in rows if isinstance(row.get(column), int | float)]
    return sum(values) / len(values)


def _failed(rows: Rows) -> str:
    passed, failed = (sum(row[name] for row in rows) for name in ("passed", "failed"))
    return f"{failed} failed, {passed} passed"


FIGURES = (
    Figure(
        "slowdown of products during an exchange",
        overlap.TITLE,
        lambda rows: rows[0]["products' slowdown"],
    ),
    Figure(
        "products and exchange together, of the longer one",
        overlap.TITLE,
        lambda rows: rows[0]["both, of the longer one"],
    ),
    Figure(
        "FSEP's layer, of stock's time",
        "One MoE layer beside stock's",
        lambda rows: _mean(_of(rows, side="fsep"), "of stock's time"),
    ),
    Figure(
        "FSEP's throughput, of stock's on forced balance",
        "Share of forced balance",
        lambda rows: _mean(_of(rows, side="fsep"), "share of forced balance"),
    ),
    Figure(
        "stock's throughput, of its own on forced balance",
        "Share of forced balance",
        lambda rows: _mean(_of(rows, side="stock"), "share of forced balance"),
    ),
    Figure(
        "exposed restores under one connection, ms",
        "FSEP with CUDA_DEVICE_MAX_CONNECTIONS=1",
        lambda rows: _mean(rows, "restore exposed ms"),
    ),
    Figure(
        "slowest kernel, of a plain copy",
        "Kernels beside a plain copy",
        lambda rows: min(row["share of a copy"] for row in rows),
    ),
    Figure(
        "fastest back end of GEMMs, of loop's time",
        "GEMM back ends beside loop",
        lambda rows: min(row["of loop's time"] for row in rows),
    ),
    Figure(
        "NCCL's memory of all communicators, MiB",
        "Memory of communicators",
        lambda rows: sum(row["most MiB"] for row in rows),
    ),
    Figure("tests that need a card", "Tests that need a card", _failed),
)


def headline(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the figures by name; one whose table is missing or empty was not measured."""
    tables = [table for part in parts.values() for table in part["tables"].items()]
    found = []
    for figure in FIGURES:
        rows = [row for title, of in tables if title.startswith(figure.title) for row in of]
        try:
            value = figure.value(rows)
        except (IndexError, KeyError, ValueError, ZeroDivisionError):
            found.append((figure.name, "not measured"))
            continue
        if not rows:
            value = "not measured"
        found.append((figure.name, f"{value:.3g}" if isinstance(value, float) else str(value)))
    return found
