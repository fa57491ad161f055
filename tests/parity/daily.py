"""The parity rows that CI runs each day, for half as many steps; the others run at night.

The rows of a day have every setting of published commands and every pair of features of published
recipes. Each of FSEP's own settings is in a row of each sharding that takes it, and in pairs with
its others. Other settings and pairs, which no published recipe has, are left to the night.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import NamedTuple

from megatron_laer.cpu.training import Adapt
from megatron_laer.tools.recipes.features import features_of
from tests.parity.row import AT_HOME, STEPS_BY_DAY, Row, words_of
from tests.parity.rows import ALL_ROWS
from tests.parity.settings import published_entries, settings_of

# Features of rows that no published recipe or command has.
UNPUBLISHED = frozenset(
    {
        *("Lion", "Muon", "SGD", "offloaded optimizer", "instances of the distributed optimizer"),
        *("announced plans", "exact plans", "forecast plans", "scheduler off"),
        *("experts restored once per step", "experts through nodes", "tokens through nodes"),
        *("quantile balancing", "sinkhorn router", "square-root softplus router", "router replay"),
        *("forced bias", "input jitter", "router in fp64", "probabilities on input"),
        *("context parallel", "graphs of mlp", "overlapped shared experts"),
    }
)

# Ranks, command line and change of the model.
StockRun = tuple[int, str, Adapt | None]


def needed(row: Row) -> frozenset[tuple[str, ...]]:
    """Return this row's settings and pairs of which each has to be run each day, with its kind."""
    at_home = AT_HOME in row.fsep
    own = words_of(row.fsep.replace(AT_HOME, ""))
    own |= {f"capacity {row.capacity}"} if row.capacity else set()
    published = features(row) - UNPUBLISHED
    megatrons = words_of(row.flags) - published_words() - own
    settings = {word for word in row.values - megatrons if not word.startswith("without ")}
    return frozenset(
        [
            *(("setting", word) for word in settings),
            *(("at home", word) for word in settings if at_home),
            *(("in this sharding", word, str(at_home)) for word in own),
            *(("of FSEP", *pair) for pair in combinations(sorted(own), 2)),
            *(("published", *pair) for pair in combinations(sorted(published), 2)),
        ]
    )


@cache
def features(row: Row) -> frozenset[str]:
    """Return the row's features, by the names of `check-recipe`."""
    return features_of(settings_of(row))


@cache
def published_words() -> frozenset[str]:
    """Return the settings of all published commands."""
    commands = (entry.get("flags", "") for entry in published_entries())
    return frozenset(word for command in commands for word in words_of(command))


def all_needed(rows: Iterable[Row]) -> set[tuple[str, ...]]:
    return {part for row in rows for part in needed(row)}


@cache
def daily() -> frozenset[str]:
    """Return ids of rows with all that any row needs, with those that older releases run too.

    Choose greedily by the runs of ranks that a row adds, its stock run included if that is new.
    Then drop rows that others make redundant, those with a stock run of their own first.
    """
    parts = {row.id: needed(row) for row in ALL_ROWS}
    runs = {row.id: _stock_run(_short(row)) for row in ALL_ROWS}
    chosen = [row for row in ALL_ROWS if row.releases]
    left = all_needed(ALL_ROWS) - all_needed(chosen)
    while left:
        there = {runs[row.id] for row in chosen}
        costs = {row.id: _ranks(row, runs[row.id] in there) for row in ALL_ROWS}
        chosen.append(max(ALL_ROWS, key=lambda row: len(parts[row.id] & left) / costs[row.id]))
        left -= parts[chosen[-1].id]
    times = Counter(part for row in chosen for part in parts[row.id])
    rows_of = Counter(runs[row.id] for row in chosen)
    for row in sorted(chosen, key=lambda row: (rows_of[runs[row.id]], len(parts[row.id]), row.id)):
        if not row.releases and all(times[part] > 1 for part in parts[row.id]):
            chosen.remove(row)
            times.subtract(parts[row.id])
    return frozenset(row.id for row in chosen)


class Case(NamedTuple):
    """A row as pytest runs it, by day for few steps, and at night whole."""

    id: str
    row: Row
    is_daily: bool


def cases() -> Iterator[Case]:
    for row in ALL_ROWS:
        first = _short(row).steps if row.id in daily() else row.steps
        yield Case(row.id, replace(row, steps=first), row.id in daily())
        for steps in sorted({row.steps, row.at_night or row.steps} - {first}):
            yield Case(f"{row.id}-{steps}", replace(row, steps=steps), is_daily=False)


@cache
def sharing() -> dict[str, str]:
    """Return for each case, by id, the first case with the same stock run."""
    first: dict[StockRun, str] = {}
    return {case.id: first.setdefault(_stock_run(case.row), case.id) for case in cases()}


def _stock_run(row: Row) -> StockRun:
    ranks, command = row.reference("DATA")
    return ranks, " ".join(command), row.adapt


def _short(row: Row) -> Row:
    """Return a row as it runs by day; those that evaluate between steps are whole."""
    return row if row.evaluations else replace(row, steps=min(row.steps, STEPS_BY_DAY))


def _ranks(row: Row, has_reference: bool) -> int:
    return row.ranks + (0 if has_reference else row.reference_ranks or row.ranks)
