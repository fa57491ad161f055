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
_EQUAL = "equal"


def compare(ranks: Ranks) -> Part:
    """Run every row of this many ranks: twice stock, once FSEP."""
    part = Part()
    table = part.tables[f"Parity on {ranks.size} ranks"] = []
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
            table.append(judged(row, distance(fsep, reference), floor))
    wrong = [of["row"] for of in table if of["result"] != _EQUAL]
    part.problems += [f"row {name} differs from stock" for name in wrong]
    return part


def judged(row: Row, found: Distance, floor: Distance) -> dict[str, Any]:
    is_equal = found.within(row.bound) and found.within(floor.times(FLOOR_FACTOR))
    result = _EQUAL if is_equal else "DIFFERS"
    return {"row": row.id, "result": result, "fsep": str(found), "floor": str(floor)}


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, compare))
