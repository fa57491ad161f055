"""Step times with and without pipelines under this process's `CUDA_DEVICE_MAX_CONNECTIONS`.

Under torchrun: `-m benchmarks.gpu.connections --data PREFIX`; the number counts from the start of a
process, so the check starts this part once for each.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import replace
from typing import Any

from benchmarks.end_to_end_cases import FSEP
from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.report import Part
from benchmarks.gpu.timing import Times
from benchmarks.training_run import Measured, Routing, measure

_PIPELINE = "--pipeline-model-parallel-size 2"
_ACCUMULATION = 4
# Flags, and the minimum number of layers.
PIPELINES = {
    "none": ("", 1),
    "pipeline 2": (_PIPELINE, 2),
    "virtual pipeline 2 x 2": (f"{_PIPELINE} --num-layers-per-virtual-pipeline-stage 1", 4),
}


def measure_pipelines(ranks: Ranks) -> Part:
    part = ranks.part()
    found: dict[str, Measured] = {}
    for name, (more, layers) in PIPELINES.items():
        stages = 2 if more else 1
        if ranks.size < 2 * stages:
            part.left_out.append(f"{name}: needs {2 * stages} ranks or more")
            continue
        size = replace(
            ranks.model,
            layers=layers if stages == 2 else ranks.model.layers,
            experts=ranks.model.experts * ranks.size,
        )
        per_group = ranks.size // stages
        flags = [
            *ranks.flags(size, per_group),
            *f"--global-batch-size {size.sequences * per_group * _ACCUMULATION}".split(),
            *FSEP.split(),
            *more.split(),
        ]
        if not ranks.may_run():
            part.left_out.append(f"{name}: the time was spent")
            continue
        balanced = Routing("--moe-router-force-load-balancing")
        found[name] = measure(flags, balanced, None, size.warm_up + size.steps)
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")
    title = f"FSEP with CUDA_DEVICE_MAX_CONNECTIONS={connections}"
    part.tables[title] = rows(found, ranks.model.warm_up)
    return part


def rows(found: dict[str, Measured], warm_up: int) -> list[dict[str, Any]]:
    return [
        {
            "pipeline": name,
            **Times.of(measured.step_ms[warm_up:]).cells("step "),
            "restore exposed ms": statistics.fmean(measured.restore_exposed_ms[warm_up:]),
            "reduce exposed ms": statistics.fmean(measured.reduce_exposed_ms[warm_up:]),
        }
        for name, measured in found.items()
    ]


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, measure_pipelines))
