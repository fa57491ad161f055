"""Figure 12 removes parts of FSEP, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

from benchmarks.command_line import program
from benchmarks.published_files import read_ablation
from scripts.paper.experiments import (
    FSEP,
    LAER,
    STATIC,
    Case,
    Experiment,
    Length,
    Method,
    Run,
    papers,
)
from scripts.paper.published import ABLATION
from scripts.paper.runner import Found, main
from scripts.paper.tables import Table, times

_VARIANTS = (
    STATIC,
    LAER,
    Method("laer-proportional", "no_even", "replicas by load alone", papers("laer-proportional")),
    Method("laer-even", "no_pq", "equal replicas alone", papers("laer-even")),
    Method(
        "laer-unscheduled",
        "no_comm_opt",
        "the paper's system without overlapped exchanges",
        f"{LAER.flags} --fsep-set scheduler=off",
    ),
    Method("laer-exact-split", None, "the paper's planner, exact splits", "--fsep-planner laer"),
    Method("greedy-even-split", None, "our planner, even splits", "--fsep-set split=even"),
    Method("forecast", None, "our planner, never a fresh layout", "--fsep-plan-mode forecast"),
    Method("exact", None, "a fresh layout each time", "--fsep-plan-mode exact"),
    FSEP,
    Method("unscheduled", None, "FSEP without overlapped exchanges", "--fsep-set scheduler=off"),
)

EXPERIMENT = Experiment(
    figure=12,
    title="Ablation",
    models=("mixtral-8x7b-e8k2",),
    toy_models=("mixtral-8x7b-e8k2",),
    cases=[Case(method) for method in _VARIANTS],
    length=Length(70, 20, "2:00:00"),
    toy_length=Length(7, 2),
    published=(ABLATION,),
    notes=(
        "no_comm_opt restores behind attention and exchanges gradients at once; "
        "--fsep-set scheduler=off waits for each exchange where it starts, so it takes away more.",
        "Rows without a name in the paper are ablations of what FSEP is here.",
    ),
)


def tables(found: Found) -> Sequence[Table]:
    """Make a row for each variant; speed is relative to the layout that never changes."""
    paper_s = {}
    if found.published is not None:
        paper_s = {name: ms / 1e3 for name, ms in read_ablation(found.published).items()}
    rows: list[dict[str, Any]] = []
    for model in found.models():
        base = Run(model, Case(STATIC))
        mine = [run for run in found.all_runs if run.model == model]
        for run in mine:
            rows.append(
                {
                    "paper": run.case.method.paper,
                    "ours": run.case.method.name,
                    **times(
                        paper_s.get(run.case.method.paper or ""),
                        paper_s.get(STATIC.paper or ""),
                        found.seconds(run),
                        found.seconds(base),
                    ),
                    "max/mean": found.balance(run),
                }
            )
    return [Table("Seconds per step, and speed over a layout that never changes", rows)]


if __name__ == "__main__":
    program("scripts/paper/figure12.py", partial(main, EXPERIMENT, tables))
