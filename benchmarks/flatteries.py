"""Shows the effect of each price in `simulate`: `python -m benchmarks.flatteries --json OUT`.

A cell is FSEP's share of forced balance: the time of stock under balanced routing, in the fastest
group, over FSEP's under the workload. Each column leaves one price out, or gives stock a handicap,
so that its difference from the first one is how much FSEP would be flattered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, print_table
from benchmarks.simulated import cluster_with, simulated
from megatron_laer.planner import clusters
from megatron_laer.planner.clusters import PACKING_PASSES
from megatron_laer.tools.simulator.iteration.methods import FSEP, STOCK
from megatron_laer.tools.traces.workloads import NATURAL


@dataclass(frozen=True)
class Left:
    """A price that is left out: other constants, or words for stock's prediction."""

    constants: Mapping[str, float] = field(default_factory=dict)
    packing_passes: int = PACKING_PASSES
    stock: str = ""


def columns(ranks: int, inter_bytes_per_s: float) -> dict[str, Left]:
    """Return what is left out, by name; the rate is the data sheet's between nodes."""
    return {
        "all prices": Left(),
        "contention": Left({"contention.gemm": 1.0, "contention.exchange": 1.0}),
        "packing": Left(packing_passes=0),
        "gate": Left({"host.gate": 1e-9, "host.launch_s": 0.0}),
        "small work": Left({"host.layer_s": 0.0}),
        "slow links": Left({"inter.bytes_per_s": inter_bytes_per_s}),
        "once per node": Left(stock="--stock-dispatcher alltoall"),
        "best group": Left(stock=f"--stock-dispatcher alltoall --stock-expert-parallel {ranks}"),
    }


CASES = tuple(
    (model, cluster, ranks, tokens, sheet)
    for model, cluster, ranks, sheet in (
        ("mixtral-8x7b-e8k2", "h100-8", 8, 5e10),
        ("qwen3-30b-a3b", "h100-8", 8, 5e10),
        ("mixtral-8x7b-e8k2", "a100-4x8-ib800", 32, 1.25e10),
        ("qwen3-30b-a3b", "h100-8", 64, 5e10),
    )
    for tokens in (4096 if ranks == 8 else 8192,)
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.flatteries", __doc__)
    add_json(parser)
    options = parser.parse_args(arguments)
    rows = [_row(workload, *case) for workload in ("W0", NATURAL) for case in CASES]
    print_table(rows)
    write_json(options.json, {"machine": machine(), "shares": rows})
    return 0


def _row(
    workload: str, model: str, cluster: str, ranks: int, tokens: int, inter_bytes_per_s: float
) -> dict[str, Any]:
    words = ["--model", model, "--ranks", str(ranks), "--tokens", str(tokens)]
    words += ["--microbatches", "4", "--recompute", "compute", "--steps", "1"]
    row: dict[str, Any] = {"case": f"{workload} {model} {cluster} N={ranks} T={tokens}"}
    for name, left in columns(ranks, inter_bytes_per_s).items():
        if left.stock.endswith(f" {ranks}") and model == "mixtral-8x7b-e8k2":
            left = Left(stock="--stock-dispatcher alltoall --stock-expert-parallel 8")
        passes = patch.object(clusters, "PACKING_PASSES", left.packing_passes)
        with passes, _cluster(cluster, left.constants) as path:
            at = [*words, "--cluster", path]
            balanced = ["--workload", "W0", "--method", STOCK, *left.stock.split()]
            stock_s = _seconds([*at, *balanced], STOCK)
            row[name] = stock_s / _seconds([*at, "--workload", workload, "--method", FSEP], FSEP)
    return row


def _cluster(name: str, constants: Mapping[str, float]) -> contextlib.AbstractContextManager[str]:
    return cluster_with(name, constants) if constants else contextlib.nullcontext(name)


def _seconds(words: list[str], method: str) -> float:
    (case,) = simulated(words)
    return float(case["methods"][method]["iteration_s"]["value"])


if __name__ == "__main__":
    program("benchmarks.flatteries", main)
