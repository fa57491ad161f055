"""Compares plan modes on routing that is known before: `python -m benchmarks.announced --help`.

Gloo ranks on this machine run Megatron's own training loop on a drifting trace, through Megatron's
router replay. The popularity of experts changes at every step, so a forecast is always outdated.
The modes run in turn, again and again, since the machine's own speed drifts. The output is the
balance, the exposed waits of the compute (mean) and the step time (median).
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import routing
from benchmarks.command_line import (
    MOST_REPEATS,
    MOST_STEPS,
    RANKS,
    add_json,
    parser_of,
    program,
    write_json,
)
from benchmarks.end_to_end import KEEP_MEMORY
from benchmarks.end_to_end_cases import FSEP, FULL, QUICK, SEED, Size
from benchmarks.report import machine, print_table
from benchmarks.training_run import Measured, Routing, measure
from megatron_laer.cpu.ranks import RankPool
from megatron_laer.tools.cli.argument_types import between
from megatron_laer.tools.data import default_text_sources, prepare_data

MODES = ("forecast", "exact", "announced")

# Smaller than the end-to-end benchmark's size, so that restores take a larger part of a step.
SIZE = replace(FULL, hidden=256, ffn=1024, sequence=128, sequences=8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.announced", __doc__)
    parser.add_argument(
        "--ranks", type=int, choices=RANKS, default=2, help="gloo ranks; they share the cores"
    )
    parser.add_argument("--repeats", type=between(1, MOST_REPEATS), default=3, help="of every mode")
    parser.add_argument(
        "--steps", type=between(1, MOST_STEPS), default=6, help="that are counted, of a run"
    )
    parser.add_argument("--quick", action="store_true", help="a small model: says nothing of speed")
    add_json(parser)
    options = parser.parse_args(arguments)
    size = replace(QUICK if options.quick else SIZE, steps=options.steps)
    found = run(size, options.ranks, options.repeats)
    rows = [summary(mode, found[mode], size) for mode in MODES]
    for row in rows:
        row["exposed / step"] = row["exposed_ms"] / row["step_ms"]
        row["step / forecast's"] = row["step_ms"] / rows[0]["step_ms"]
    print_table(rows)
    write_json(options.json, {"machine": machine(), "ranks": options.ranks, "modes": rows})
    return 0


def run(size: Size, ranks: int, repeats: int) -> dict[str, list[list[Measured]]]:
    """Run every mode `repeats` times; return the measurements of each run's ranks."""
    found: dict[str, list[list[Measured]]] = {mode: [] for mode in MODES}
    steps = size.warm_up + size.steps
    shape = size.routing_shape(ranks)
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.dict(os.environ, KEEP_MEMORY),
        RankPool(ranks) as pool,
    ):
        prefix, trace = f"{scratch}/text", Path(scratch) / "drifting.npy"
        prepare_data(default_text_sources()[:150], prefix, progress=False)
        np.save(trace, routing.drifting_trace(shape, steps + 1, SEED))
        replayed = Routing("--moe-enable-routing-replay", trace=trace)
        for repeat in range(repeats):
            for mode in MODES if repeat % 2 == 0 else MODES[::-1]:
                flags = [
                    *size.flags(prefix, ranks),
                    *f"--data-cache-path {scratch}/cache {FSEP} --fsep-plan-mode {mode}".split(),
                ]
                found[mode].append(pool.run(measure, flags, replayed, shape, steps, timeout_s=3600))
    return found


def summary(mode: str, runs: list[list[Measured]], size: Size) -> dict[str, Any]:

    def counted(name: str) -> list[float]:
        values = [getattr(rank, name)[size.warm_up :] for ranks in runs for rank in ranks]
        return [value for of_rank in values for value in of_rank]

    # A layer has one microbatch per step; the warm-up steps of each layer are not counted.
    skews = [
        skew
        for ranks in runs
        for of_layer in np.split(np.array(ranks[0].fsep_skew), size.layers)
        for skew in of_layer[size.warm_up :]
    ]
    return {
        "mode": mode,
        "max_over_mean": statistics.mean(skews),
        "worst": max(skews),
        "exposed_ms": statistics.mean(counted("restore_exposed_ms")),
        "step_ms": statistics.median(counted("step_ms")),
    }


if __name__ == "__main__":
    program("python -m benchmarks.announced", main)
