"""The advice as text and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_laer.config import flag_name
from megatron_laer.tools.simulator import output
from megatron_laer.tools.simulator.advisor.predictor import Candidate, Run
from megatron_laer.tools.simulator.advisor.search import Found, Results
from megatron_laer.tools.simulator.advisor.settings import group_flags

_GIB = 2**30

LEGEND = """\
Each row has the fastest slots, exchange of tokens and restore of its group size and sharding. Of
times within 1 % of the fastest, those that leave the most memory free come first, and groups over
nodes that may lose last. share: time of stock under perfectly balanced counts, with its fastest
dispatcher and group that fit, over the row's time under the given routing. x stock: how many times
as fast as the first stock, with the range over the constants. EP: ranks of a group; C: slots per
rank; overlap: Megatron's combined 1F1B; full recompute: tried for what does not fit without."""


def text(title: str, run: Run, results: Results) -> str:
    """Return the verdict with its numbers and flags, then all the rest."""
    most_gib = run.most_bytes / _GIB
    ours, stocks = results.best.found, results.stocks.found
    found = [*ours, *stocks[:1]]
    parts = [output.filled(results.verdict(most_gib))]
    if found:
        chosen = ours[0] if results.takes_fsep else stocks[0]
        parts.append(output.filled(_numbers(chosen, results, most_gib)))
        parts.append(f"flags: {flags(run, chosen.candidate)}")
    tried = f"{results.best.tried} settings of FSEP compared; {len(results.best.too_large)} of"
    parts.append(output.filled(f"{title}. {tried} them need more than {most_gib:.3g} GiB"))
    if found:
        parts += [_table(results), LEGEND]
        lines = [f"  {of.label}:\n    {flags(run, of.candidate)}" for of in found]
        parts.append("\n".join(["flags of each row:", *lines]))
    return "\n\n".join(
        [*parts, *filter(None, [output.filled(output.not_given(run.rates[0].cluster))])]
    )


def _numbers(chosen: Found, results: Results, most_gib: float) -> str:
    of, share = chosen.prediction, results.share(chosen)
    balanced = f"{share:.1%} of perfectly balanced speed, " if share <= 1 else ""
    return (
        f"{of.iteration_s:.4g} s per iteration ({of.low_s:.4g} to {of.high_s:.4g}), "
        f"{balanced}max/mean "
        f"{of.max_over_mean:.3f}, {of.peak_bytes / _GIB:.1f} of {most_gib:.3g} GiB"
    )


def flags(run: Run, candidate: Candidate) -> str:
    """Return Megatron's flags of a candidate next to the given ones."""
    common = candidate.variant.flags
    if candidate.setting is not None:
        allow = [flag_name("allow_unproven"), *map(str, run.allow)] if run.allow else []
        return shlex.join([*common, *candidate.setting.flags, *allow])
    assert candidate.method.group is not None
    of_group = group_flags(candidate.method.group, candidate.dispatcher, candidate.combined)
    return shlex.join([*common, *of_group])


def content(run: Run, results: Results) -> dict[str, Any]:
    """Return the content of the JSON file."""

    def listed(found: Found) -> dict[str, Any]:
        named = {"label": found.label, "flags": flags(run, found.candidate)}
        return named | {"share": results.share(found)} | output.content(found.prediction)

    return {
        "takes_fsep": results.takes_fsep,
        "verdict": results.verdict(run.most_bytes / _GIB),
        "best": [*map(listed, results.best.found)],
        "stock": [*map(listed, results.stocks.found)],
        "as_given": None if results.as_given is None else listed(results.as_given),
        "balanced": listed(results.balanced),
        "tried": results.best.tried,
        "too_large": len(results.best.too_large),
        "least_bytes": dict([results.best.least, results.stocks.least]),
    }


def _table(results: Results) -> str:
    ours, stock, balanced = results.best.found, results.stocks.first, results.balanced
    rows = [replace(of, label=f"{place}  {of.label}") for place, of in enumerate(ours, start=1)]
    rows += [replace(of, label=f"   {of.label}") for of in results.stocks.found]
    given = results.as_given
    if given is not None and given.label not in {of.label for of in results.stocks.found}:
        rows.append(replace(given, label=f"   {given.label}, flags as given"))
    rows.append(replace(balanced, label=f"   {balanced.label}, balanced counts"))
    shown: dict[str, Callable[[Found], str]] = {
        "": lambda of: of.label,
        **output.columns(None if stock is None else stock.prediction),
        "share": lambda of: f"{results.share(of):.3f}",
    }
    return output.table(shown, rows)
