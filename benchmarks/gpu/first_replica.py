"""Time and free memory of the step that has a run's first replicas, after many without any.

Under torchrun: `-m benchmarks.gpu.first_replica --data PREFIX`. Megatron's router replay imposes
balanced routing, then all hot experts on one rank, and at last a rank without tokens.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.end_to_end_cases import FSEP
from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.report import Part
from benchmarks.routing import replayed
from benchmarks.training_run import Measured, Routing, measure

TITLE = "Steps around the first replicas"
_BALANCED, _SKEWED = 20, 4
_DRY = 3, 2


def measure_first_replica(ranks: Ranks) -> Part:
    part = ranks.part()
    size = replace(ranks.model, experts=ranks.model.experts * ranks.size)
    shape = size.routing_shape(ranks.size)
    balanced, skewed = _DRY if ranks.dry else (_BALANCED, _SKEWED)
    lengths = {"W0": balanced, "W2": skewed, "W5": skewed + 1}  # the last one ends the step before
    path = ranks.folder / "first-replica.npy"
    if ranks.rank == 0:
        np.save(path, np.concatenate([replayed(name, shape, n) for name, n in lengths.items()]))
    if not ranks.may_run():
        part.left_out.append("first replicas: the time was spent")
        return part
    steps = balanced + 2 * skewed
    routing = Routing("--moe-enable-routing-replay", trace=path)
    found = measure([*ranks.flags(size, ranks.size), *FSEP.split()], routing, shape, steps)
    part.tables[TITLE] = rows(found, balanced, skewed, size.warm_up)
    return part


def rows(found: Measured, balanced: int, skewed: int, warm_up: int) -> list[dict[str, Any]]:
    """Return the largest time of each kind of step, and the memory that was free at its end."""
    kinds = {
        "balanced": slice(warm_up, balanced),
        "first replicas": slice(balanced, balanced + 1),
        "hot rank": slice(balanced + 1, balanced + skewed),
        "rank without tokens": slice(balanced + skewed, balanced + 2 * skewed),
    }
    return [
        {
            "steps": name,
            "most ms": max(found.step_ms[steps]),
            "least free MiB": min(found.free_bytes[steps]) / 2**20,
        }
        for name, steps in kinds.items()
    ]


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, measure_first_replica))
