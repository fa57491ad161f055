"""Parity rows over NCCL, or gloo: the ranks that torchrun starts train stock and FSEP.

    torchrun --nproc-per-node 4 -m tests.parity.launched --data PREFIX

runs those rows that need as many ranks as there are, on any number of nodes, until its time is
spent. Bounds are those of the CPU; a row beyond its own fails. Rank 0 prints.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.report import Part
from megatron_laer.cpu.training import Adapt, Record
from tests.parity.compare import Distance, distance
from tests.parity.replay import train_row
from tests.parity.row import FLOOR_FACTOR, SMALLEST_FLOOR, Row
from tests.parity.rows import ROWS

_DRY_STEPS = 2


def compare(ranks: Ranks) -> Part:
    """Run every row of this many ranks: twice stock, once FSEP."""
    part = Part()
    found: list[tuple[Row, Distance, Distance]] = []
    chosen = [row for row in ROWS if row.ranks == ranks.size and row.reference_ranks is None]
    more = ["--distributed-backend", "nccl"]
    more += ["--train-iters", str(_DRY_STEPS)] if ranks.dry else []

    @cache
    def run(command: tuple[str, ...], adapt: Adapt | None) -> Record | None:
        """Train, once where rows share a stock run, if there is time."""
        return train_row([*command, *more], adapt=adapt) if ranks.may_run() else None

    for row in chosen[:1] if ranks.dry else chosen:
        runs = row.reference(ranks.data), row.other_stock(ranks.data), row.fsep_run(ranks.data)
        reference, other, fsep = (run(tuple(command), row.adapt) for _, command in runs)
        if reference is None or other is None or fsep is None:
            part.left_out.append(f"row {row.id}: the time was spent")
        elif ranks.rank == 0:
            floor = distance(other, reference).at_least(SMALLEST_FLOOR)
            found.append((row, distance(fsep, reference), floor))
    part.tables[f"Parity on {ranks.size} ranks"] = rows(found)
    part.problems += [
        f"row {row.id} differs from stock"
        for row, mine, floor in found
        if not is_equal(row, mine, floor)
    ]
    return part


def rows(found: list[tuple[Row, Distance, Distance]]) -> list[dict[str, Any]]:
    return [
        {
            "row": row.id,
            "result": "equal" if is_equal(row, mine, floor) else "DIFFERS",
            "fsep": str(mine),
            "floor": str(floor),
        }
        for row, mine, floor in found
    ]


def is_equal(row: Row, found: Distance, floor: Distance) -> bool:
    return found.within(row.bound) and found.within(floor.times(FLOOR_FACTOR))


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, compare))
