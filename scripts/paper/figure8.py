"""Figure 8 compares iteration times end to end: six models, four methods, two auxiliary losses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

from benchmarks.command_line import program
from benchmarks.published_files import read_cells
from scripts.paper.experiments import (
    FSEP,
    LAER,
    MODELS,
    STATIC,
    STOCK,
    Case,
    Experiment,
    Length,
    Run,
)
from scripts.paper.published import END_TO_END
from scripts.paper.runner import Found, main
from scripts.paper.tables import Table, ratio

_METHODS = (STOCK, STATIC, LAER, FSEP)
# The artifact's name of a method that nothing here trains with.
_FLEXMOE = "FLEX"

EXPERIMENT = Experiment(
    figure=8,
    title="End to end",
    models=MODELS,
    toy_models=("mixtral-8x7b-e8k2", "mixtral-8x7b-e16k4"),
    cases=[Case(method, aux) for aux, method in product(("0", "1e-4"), _METHODS)],
    toy_cases=[Case(method) for method in _METHODS],
    length=Length(70, 20, "2:00:00"),
    toy_length=Length(7, 2),
    published=(END_TO_END,),
    notes=(
        "FLEX (FlexMoE) has no counterpart in training; scripts/paper/simulated.py has it.",
        "fsep has none in the paper; compare it with LAER's row.",
        "Ours are of one data set, --data-prefix; give another its own --work-dir.",
    ),
)


def tables(found: Found) -> Sequence[Table]:
    """Make a row per model, auxiliary loss and method; speed is relative to stock Megatron."""
    cells = [] if found.published is None else read_cells(found.published)
    paper_s = {
        (cell.dataset, cell.model, float(cell.aux_loss), cell.method): cell.measured_s
        for cell in cells
    }
    datasets = sorted({cell.dataset for cell in cells}) or ["wikitext"]
    rows: list[dict[str, Any]] = []
    for model in found.models():
        for aux in dict.fromkeys(run.case.aux for run in found.all_runs):
            mine = [run for run in found.all_runs if (run.model, run.case.aux) == (model, aux)]
            base = Run(model, Case(STOCK, aux))
            pairs: list[tuple[str | None, Run | None]] = [
                (run.case.method.paper, run) for run in mine
            ]
            for name, run in [*pairs, (_FLEXMOE, None)]:
                row: dict[str, Any] = {"model": model, "aux": aux, "paper": name}
                for dataset in datasets:
                    published_s, published_base_s = (
                        paper_s.get((dataset, model, float(aux), method or ""))
                        for method in (name, STOCK.paper)
                    )
                    row[f"paper s, {dataset}"] = published_s
                    row[f"paper speed, {dataset}"] = ratio(published_base_s, published_s)
                ours_s, base_s = found.seconds(run), found.seconds(base)
                rows.append(
                    row
                    | {"ours": run and run.case.method.name, "s": ours_s}
                    | {"speed": ratio(base_s, ours_s), "max/mean": found.balance(run)}
                )
    return [Table("Seconds per step, and speed over stock Megatron", rows)]


if __name__ == "__main__":
    program("scripts/paper/figure8.py", partial(main, EXPERIMENT, tables))
