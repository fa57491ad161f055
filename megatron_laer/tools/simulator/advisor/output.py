"""The advice as text and as JSON."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_laer.config import flag_name
from megatron_laer.tools.simulator.advisor.answer import Turn, takes_fsep, verdict_of
from megatron_laer.tools.simulator.advisor.predictor import Candidate, Run
from megatron_laer.tools.simulator.advisor.search import Found, Results
from megatron_laer.tools.simulator.advisor.settings import group_flags
from megatron_laer.tools.simulator.iteration_output import not_given
from megatron_laer.tools.simulator.rendering import aligned
from megatron_laer.tools.simulator.verdict import gain

_GIB, _WIDTH = 2**30, 100

LEGEND = """\
Each row has the fastest slots and exchanges of its group size and sharding. share: time of stock
under perfectly balanced counts, in its fastest group that fits, over the row's time under the given
routing. x stock: how many times as fast as the first stock, with the range over the constants.
EP: ranks of a group; C: slots per rank; overlap: Megatron's combined 1F1B."""


def text(title: str, run: Run, results: Results, turn: Turn | None, common: Sequence[str]) -> str:
    """Return the verdict with its numbers, flags and the constant to measure, then all the rest."""
    found, most_gib = _listed(results), run.most_bytes / _GIB
    parts = [_filled(verdict_of(results, most_gib))]
    if found:
        chosen = found[0] if takes_fsep(results) else results.stocks[0]
        parts.append(_filled(_numbers(chosen, results, most_gib)))
        parts.append(f"flags: {shlex.join(flags(run, chosen.candidate, common))}")
    if turn is not None:
        parts.append(_filled(_deciding(turn)))
    parts.append(
        f"{title}. {results.tried} settings of FSEP compared; {results.too_large} of them need "
        f"more than {most_gib:.3g} GiB"
    )
    if found:
        parts += [_table(results), LEGEND]
        parts.append("\n".join(["flags of each row:", *_flag_lines(run, found, common)]))
    return "\n\n".join([*parts, *filter(None, [_filled(not_given(run.rates[0].cluster))])])


def _numbers(chosen: Found, results: Results, most_gib: float) -> str:
    of = chosen.prediction
    return (
        f"{of.iteration_s:.4g} s per iteration ({of.low_s:.4g} to {of.high_s:.4g}), "
        f"{results.balanced.seconds / chosen.seconds:.1%} of perfectly balanced speed, max/mean "
        f"{of.max_over_mean:.3f}, {of.peak_bytes / _GIB:.1f} of {most_gib:.3g} GiB"
    )


def flags(run: Run, candidate: Candidate, common: Sequence[str]) -> list[str]:
    """Return Megatron's flags of a candidate, with those that all have in common."""
    if candidate.setting is not None:
        allow = [flag_name("allow_unproven"), *map(str, run.allow)] if run.allow else []
        return [*common, *candidate.setting.flags, *allow]
    assert candidate.method.group is not None
    return [*common, *group_flags(candidate.method.group, run.stock_flex, candidate.combined)]


def content(run: Run, results: Results, turn: Turn | None, common: Sequence[str]) -> dict[str, Any]:
    """Return the content of the JSON file."""

    def listed(found: Found) -> dict[str, Any]:
        prediction = found.prediction
        return {
            "label": found.candidate.label,
            "flags": shlex.join(flags(run, found.candidate, common)),
            "iteration_s": prediction.range_s,
            "share": results.balanced.seconds / found.seconds,
            "peak_bytes": prediction.peak_bytes,
            "max_over_mean": prediction.max_over_mean,
        }

    return {
        "takes_fsep": takes_fsep(results),
        "verdict": verdict_of(results, run.most_bytes / _GIB),
        "best": [listed(found) for found in results.best],
        "stock": [listed(found) for found in results.stocks],
        "balanced": listed(results.balanced),
        "tried": results.tried,
        "too_large": results.too_large,
        "least_bytes": dict(results.least_bytes),
        "decides": None if turn is None else asdict(turn),
    }


def _listed(results: Results) -> list[Found]:
    return [*results.best, *results.stocks[:1]]


def _table(results: Results) -> str:
    lines: list[tuple[str, ...]] = [
        ("", "", "s/iteration", "low", "high", "x stock", "share", "max/mean", "GiB")
    ]
    rows = [(str(place), found) for place, found in enumerate(results.best, start=1)]
    rows += [("", found) for found in results.stocks]
    for number, found in rows:
        prediction = found.prediction
        over = results.stocks[0].prediction if results.stocks else None
        lines.append(
            (
                number,
                found.candidate.label,
                f"{prediction.iteration_s:.4g}",
                f"{prediction.low_s:.4g}",
                f"{prediction.high_s:.4g}",
                "-" if over is None else str(gain(prediction, over)).replace(" times", ""),
                f"{results.balanced.seconds / found.seconds:.3f}",
                f"{prediction.max_over_mean:.3f}",
                f"{prediction.peak_bytes / _GIB:.1f}",
            )
        )
    balanced = results.balanced
    size = f"{balanced.prediction.peak_bytes / _GIB:.1f}"
    label = f"{balanced.candidate.label}, balanced counts"
    lines.append(("", label, f"{balanced.seconds:.4g}", "", "", "", "1.000", "", size))
    return aligned(lines, left=(0, 1))


def _flag_lines(run: Run, found: Sequence[Found], common: Sequence[str]) -> list[str]:
    return [
        f"  {each.candidate.label}:\n    {shlex.join(flags(run, each.candidate, common))}"
        for each in found
    ]


def _deciding(turn: Turn) -> str:
    """Name the one constant whose measurement could change the answer."""
    if not turn.matters:
        return (
            "Measure first: nothing. No constant, at either end of its spread, changes the answer "
            "by itself."
        )
    at = f"{turn.constant} at {turn.value:.3g} instead of {turn.nominal:.3g}"
    if turn.reverses:
        there = f"{turn.best} is {turn.gain:.2f} times as fast as stock, which reverses the answer"
    else:
        there = f"{turn.best} is {turn.loss:.2f} times as fast as the first row"
    return f"Measure first: {turn.constant}. With {at}, {there} (`calibrate` measures it)."


def _filled(words: str) -> str:
    return textwrap.fill(words, _WIDTH, break_on_hyphens=False, break_long_words=False)
