"""Figure 10 breaks an iteration down by kind, and counts the tokens of the busiest rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

from benchmarks.command_line import program
from benchmarks.published_files import read_breakdown
from scripts.paper.experiments import FSEP, LAER, STATIC, Case, Experiment, Length, family
from scripts.paper.published import BREAKDOWN, TOKENS, read_balance
from scripts.paper.runner import Found, main
from scripts.paper.tables import Table

_MODELS = ("mixtral-8x7b-e8k2", "mixtral-8x7b-e16k4")
_FLEXMOE = "FLEX"

EXPERIMENT = Experiment(
    figure=10,
    title="Breakdown of a step, and tokens of the busiest rank",
    models=_MODELS,
    toy_models=_MODELS,
    cases=[Case(method) for method in (STATIC, LAER, FSEP)],
    length=Length(40, 20, "1:30:00"),
    toy_length=Length(7, 2),
    records_metrics=True,
    published=(BREAKDOWN, *TOKENS),
    notes=(
        "Ours are of the planner rank, rank 0, and mean steps; the paper's are means over ranks of "
        "one profiled step.",
        "Token exchanges wait for the busiest rank, in both. rest is all else; exposed waits are "
        "within experts and rest.",
        "FLEX (FlexMoE) has no counterpart in training.",
    ),
)


def tables(found: Found) -> Sequence[Table]:
    of_paper, balance = {}, {}
    if found.published is not None:
        of_paper, balance = read_breakdown(found.published), read_balance(found.published)
    times: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    for model in found.models():
        mine = [run for run in found.all_runs if run.model == model]
        for name, run in [*((run.case.method.paper, run) for run in mine), (_FLEXMOE, None)]:
            labels = {"model": model, "paper": name, "ours": run and run.case.method.name}
            profile = None if run is None else found.profiles.get(run)
            published = of_paper.get((model, name or ""))
            times.append(
                {
                    **labels,
                    **_kinds("paper ", published),
                    **_kinds("", None if profile is None else profile.kinds),
                    "exposed s": profile and profile.exposed_s,
                }
            )
            tokens.append(
                {
                    **labels,
                    "paper max/mean": balance.get((family(model), name or "")),
                    "max/mean": profile and profile.max_over_mean,
                    "stock's placement": profile and profile.stock_max_over_mean,
                }
            )
    return [
        Table("Seconds of a step; exposed are waits for restores and gradients", times),
        Table("Tokens of the busiest rank over the mean, mean of layers and microbatches", tokens),
    ]


def _kinds(of: str, seconds: tuple[float, float, float] | None) -> dict[str, float | None]:
    """Make columns of seconds for token exchange, experts and the rest of the step."""
    names = [f"{of}{kind} s" for kind in ("tokens", "experts", "rest")]
    if seconds is None:
        return dict.fromkeys(names)
    tokens_s, experts_s, step_s = seconds
    return dict(zip(names, (tokens_s, experts_s, step_s - tokens_s - experts_s), strict=True))


if __name__ == "__main__":
    program("scripts/paper/figure10.py", partial(main, EXPERIMENT, tables))
