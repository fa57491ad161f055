"""Figure 10 breaks an iteration down by kind, and counts the tokens of the busiest rank."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where it is run as a file

from benchmarks.command_line import program
from benchmarks.published_files import read_breakdown
from scripts.paper.experiments import FSEP, LAER, STATIC, Case, Experiment, Length, Run, family
from scripts.paper.measured import Profile
from scripts.paper.published import BREAKDOWN, TOKENS, read_balance
from scripts.paper.runner import Found, main
from scripts.paper.tables import Table, ratio

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
    exchanges: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    curves_of: dict[str, dict[str, Sequence[float]]] = {}
    for model in found.models():
        mine = [run for run in found.all_runs if run.model == model]
        paper_base = of_paper.get((model, STATIC.paper or ""))
        base = found.profiles.get(Run(model, Case(STATIC)))
        curves: dict[str, Sequence[float]] = {}
        for name, run in [*((run.case.method.paper, run) for run in mine), (_FLEXMOE, None)]:
            labels = {"model": model, "paper": name, "ours": run and run.case.method.name}
            profile = None if run is None else found.profiles.get(run)
            published = of_paper.get((model, name or ""))
            times.append(
                {
                    **labels,
                    **_kinds("paper ", published),
                    **_kinds("", _kinds_of(profile)),
                    "exposed s": profile and profile.exposed_s,
                }
            )
            exchanges.append(
                {
                    **labels,
                    **_exchange("paper ", published, paper_base),
                    **_exchange("", _kinds_of(profile), _kinds_of(base)),
                }
            )
            curve = balance.get((family(model), name or ""))
            tokens.append(
                {
                    **labels,
                    "paper max/mean": None if curve is None else statistics.fmean(curve),
                    "max/mean": profile and profile.max_over_mean,
                    "stock's placement": profile and profile.stock_max_over_mean,
                }
            )
            if curve is not None:
                curves[f"paper {name}"] = curve
            if run is not None and profile is not None:
                curves[run.case.method.name] = profile.max_over_mean_L
        curves_of[model] = curves
    names = dict.fromkeys(name for curves in curves_of.values() for name in curves)
    layers = [
        {"model": model, "layer": layer + 1}
        | {name: dict(enumerate(curves.get(name, ()))).get(layer) for name in names}
        for model, curves in curves_of.items()
        for layer in range(max(map(len, curves.values()), default=0))
    ]
    found_tables = [
        Table("Seconds of a step; exposed are waits for restores and gradients", times),
        Table("Token exchange: share of the step, and speed over static's", exchanges),
        Table("Tokens of the busiest rank over the mean, mean of layers and microbatches", tokens),
    ]
    if layers:
        found_tables.append(Table("The same by layer", layers))
    return found_tables


def _kinds_of(profile: Profile | None) -> tuple[float, float, float] | None:
    return None if profile is None else profile.kinds


def _exchange(
    of: str, seconds: tuple[float, ...] | None, base: tuple[float, ...] | None
) -> dict[str, float | None]:
    """Make columns of the token exchange's share, and of its speed relative to a base."""
    if seconds is None:
        return dict.fromkeys([f"{of}share", f"{of}speed"])
    speed = ratio(None if base is None else base[0], seconds[0])
    return {f"{of}share": seconds[0] / seconds[-1], f"{of}speed": speed}


def _kinds(of: str, seconds: tuple[float, float, float] | None) -> dict[str, float | None]:
    """Make columns of seconds for token exchange, experts and the rest of the step."""
    names = [f"{of}{kind} s" for kind in ("tokens", "experts", "rest")]
    if seconds is None:
        return dict.fromkeys(names)
    tokens_s, experts_s, step_s = seconds
    return dict(zip(names, (tokens_s, experts_s, step_s - tokens_s - experts_s), strict=True))


if __name__ == "__main__":
    program("scripts/paper/figure10.py", partial(main, EXPERIMENT, tables))
