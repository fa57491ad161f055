"""Figure 9 compares convergence: does FSEP have a low auxiliary loss at the speed of a high one?"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

from benchmarks.command_line import program
from scripts.paper.experiments import FSEP, LAER, STOCK, Case, Experiment, Length
from scripts.paper.published import CONVERGENCE, Curve, read_curves
from scripts.paper.runner import Found, main
from scripts.paper.tables import Table, ratio

# Number of last steps whose mean is the final loss.
_LAST = 10
_HIGH, _LOW = Case(STOCK, "1e-2"), Case(STOCK, "1e-4")
_FSEP = Case(FSEP, "1e-4")

EXPERIMENT = Experiment(
    figure=9,
    title="Convergence: low auxiliary loss at the speed of a high one",
    models=("mixtral-8x7b-e8k2",),
    toy_models=("mixtral-8x7b-e8k2",),
    cases=(_HIGH, _LOW, _FSEP),
    length=Length(3000, 20, "24:00:00"),
    toy_length=Length(100, 20),
    sequence=4096,
    sequences=4,
    stock_tensor={"e8k2": 4},
    # So short a run learns only with a large learning rate.
    toy_flags="--lr 2e-3 --min-lr 2e-4",
    published=(CONVERGENCE,),
    starts_alike=True,
)


def tables(found: Found) -> Sequence[Table]:
    """Make a row for each run, and one for each half of the paper's claim."""
    ours = {
        run.case: Curve(measured.losses, measured.step_s) for run, measured in found.runs.items()
    }
    paper: dict[Case, Curve] = {}
    if found.published is not None:
        curves = read_curves(found.published)
        names = {_HIGH: STOCK.paper, _LOW: STOCK.paper, _FSEP: LAER.paper}
        paper = {
            case: curves[name, float(case.aux)]
            for case, name in names.items()
            if name is not None and (name, float(case.aux)) in curves
        }
    rows = [
        {
            "run": f"{case.method.name}, aux {case.aux}",
            **{f"paper {name}": value for name, value in _summary(paper.get(case)).items()},
            **_summary(ours.get(case)),
        }
        for case in dict.fromkeys(run.case for run in found.all_runs)
    ]
    answers = [
        {"": name, "paper": value, "ours": mine}
        for (name, value), mine in zip(answer(paper).items(), answer(ours).values(), strict=True)
    ]
    return [
        Table(f"Runs; the final loss is the mean of the last {_LAST} steps", rows),
        Table("Low auxiliary loss at the speed of a high one?", answers),
    ]


def _summary(curve: Curve | None) -> dict[str, float | None]:
    if curve is None:
        return dict.fromkeys(("s", "hours", "final loss"))
    return {
        "s": _step_s(curve),
        "hours": sum(curve.step_s) / 3600,
        "final loss": _final(curve),
    }


def _step_s(curve: Curve) -> float:
    """Return the mean step time, without the same share of first steps at either scale."""
    share = EXPERIMENT.length.skipped / EXPERIMENT.length.steps
    return statistics.fmean(curve.step_s[max(1, round(share * len(curve.step_s))) :])


def _final(curve: Curve) -> float:
    return statistics.fmean(curve.losses[-_LAST:])


def answer(curves: Mapping[Case, Curve]) -> dict[str, Any]:
    """Compare FSEP with the low loss to stock with either; None for missing runs."""
    high, low, fsep = (curves.get(case) for case in (_HIGH, _LOW, _FSEP))

    def speed(stock: Curve | None) -> float | None:
        return None if stock is None or fsep is None else _step_s(stock) / _step_s(fsep)

    def loss_less(stock: Curve | None) -> float | None:
        return None if stock is None or fsep is None else _final(stock) - _final(fsep)

    errors = None
    if low is not None and fsep is not None:
        steps = zip(fsep.losses, low.losses, strict=False)
        errors = statistics.fmean(abs(ours - stocks) / stocks for ours, stocks in steps)
    reached_s = None if high is None or fsep is None else _seconds_to(fsep, _final(high))
    whole_s = None if high is None else sum(high.step_s)
    return {
        "speed of FSEP, low loss, over stock, high loss": speed(high),
        "speed of FSEP, low loss, over stock, low loss": speed(low),
        "final loss of stock, high loss, less that of FSEP": loss_less(high),
        "final loss of stock, low loss, less that of FSEP": loss_less(low),
        "mean relative error of FSEP's loss to stock's, low loss (claim: below 1e-3)": errors,
        "time of stock, high loss, over FSEP's to its final loss": ratio(whole_s, reached_s),
    }


def _seconds_to(curve: Curve, loss: float) -> float | None:
    """Return the time at which the mean of the last steps first reaches a loss."""
    for step, passed_s in enumerate(accumulate(curve.step_s), start=1):
        if step >= _LAST and statistics.fmean(curve.losses[step - _LAST : step]) <= loss:
            return passed_s
    return None


if __name__ == "__main__":
    program("scripts/paper/figure9.py", partial(main, EXPERIMENT, tables))
