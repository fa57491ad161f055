"""The tables of docs/support.md: features, parity rows, refusals, and figures of test runs.

    python -m pytest tests/distributed/test_parity.py --junitxml results.xml
    python -m tests.parity.report results.xml …

writes the figures into `figures.csv`; `python -m tests.site_pages` then writes the page.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from megatron_laer.rules import REFUSALS, RULES, UNPROVEN
from tests.parity import daily
from tests.parity.compare import Distance
from tests.parity.features import ALLOW, FEATURES, REPLACED, SEEN_ON_A_CARD
from tests.parity.row import Row
from tests.parity.rows import ALL_ROWS, HOME_ROWS, ROWS

FIGURES = Path(__file__).with_name("figures.csv")

_NONE = "–"
_NOTHING = "nothing yet"
_MOST_ROWS = 4
_COLUMNS = ("gradients", "losses", "norms", "weights", "MoE losses")

# Distance and floor of a row by column, in `_COLUMNS`' order; "" where a row has no such figure.
Figures = list[str]


def figures_of(found: Distance, floor: Distance, row: Row) -> Figures:
    """Return the figures of a run, without those that have no meaning for the row."""
    logs = "--moe-aux-loss-coeff" in row.flags
    shows = (row.gradients, True, row.steps > 0, row.steps > 0, logs)
    pairs = zip(zip(found.parts(), floor.parts(), strict=True), shows, strict=True)
    return [f"{part:.1e}" if shown else "" for pair, shown in pairs for part in pair]


def described(row: Row) -> str:
    """Return the row's features, by the names of `check-recipe`, and its unusual sizes."""
    words = sorted(daily.features(row), key=str.lower)
    if (row.experts, row.ranks) != (8, 2):
        words.append(f"E = {row.experts} on {row.ranks} ranks")
    words += [f"groups of {row.expert_parallel}"] if row.expert_parallel else []
    words += [f"accumulation {row.accumulation}"] if row.accumulation > 1 else []
    words += [f"{row.capacity} slots"] if row.capacity else []
    return ", ".join(words)


def figures_in(results: Path) -> dict[str, Figures]:
    """Read figures by row's id from pytest's `--junitxml`; ValueError if a row failed."""
    rows = {row.id: row for row in ALL_ROWS}
    found: dict[str, Figures] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        values = {item.get("name"): item.get("value") or "" for item in case.iter("property")}
        if case.find("failure") is not None or case.find("error") is not None:
            raise ValueError(f"{results}: {case.get('name')} failed; its row must pass first")
        if (name := values.get("row")) in rows:
            distances = (_distance(values["fsep"]), _distance(values["floor"]))
            found[name] = figures_of(*distances, rows[name])
    return found


def _distance(text: str) -> Distance:
    words = text.split()
    return Distance(
        **{name: float(part) for name, part in zip(words[::2], words[1::2], strict=True)}
    )


def read_figures(path: Path | None = None) -> dict[str, Figures]:
    with (path or FIGURES).open(encoding="utf-8", newline="") as file:
        _, *lines = csv.reader(file)
    return {row: figures for row, _, *figures in lines}


def write_figures(figures: Mapping[str, Figures], path: Path | None = None) -> None:
    with (path or FIGURES).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = (head for name in _COLUMNS for head in (name, f"{name} floor"))
        writer.writerow(["row", "features and sizes", *heads])
        for row in (row for row in ALL_ROWS if row.id in figures):
            writer.writerow([row.id, described(row), *figures[row.id]])


def counts() -> Iterator[str]:
    yield (
        f"**{len(ROWS)} combinations are proved equal to stock, {len(HOME_ROWS)} of them with "
        f"experts at home as well; {len(RULES)} rules refuse others.**"
    )


def features() -> Iterator[str]:
    """Yield every feature, its proof, and its rows."""
    yield "| feature | proved by | rows, or the flag that allows it |"
    yield "|---|---|---|"
    for feature, names in {**rows_by_feature(), **FEATURES}.items():
        yield f"| {feature} | {proved_by(names)} | {_code(*names)} |"


def rows_by_feature() -> dict[str, list[str]]:
    """Return the rows that prove each feature best: without replacements, then with few others."""
    best = sorted(ROWS, key=lambda row: (_is_replaced(row), len(daily.features(row))))
    there = sorted({feature for row in ROWS for feature in daily.features(row)}, key=str.lower)
    return {
        feature: [row.id for row in best if feature in daily.features(row)][:_MOST_ROWS]
        for feature in there
    }


def replaced() -> Iterator[str]:
    yield from (f"* {part}" for part in REPLACED.values())


def refused() -> Iterator[str]:
    yield "| refused | instead |"
    yield "|---|---|"
    for rule in REFUSALS:
        way_out = rule.said_way_out
        if rule.words:
            values = " or ".join(rule.unproven_values)
            way_out += f"; {values} with `{ALLOW} {' or '.join(rule.words)}`"
        yield f"| `{rule.setting}` | {way_out} |"


def allowed() -> Iterator[str]:
    yield "| word | allows | settings | proved by |"
    yield "|---|---|---|---|"
    for word, text in UNPROVEN.items():
        settings = _code(*_allowed_by(word))
        flag = f"{ALLOW} {word}"
        names = {name for names in FEATURES.values() if flag in names for name in names}
        yield f"| `{word}` | {text} | {settings} | {proved_by(names)} |"


TABLES = {
    "counts": counts,
    "features": features,
    "replaced": replaced,
    "refused": refused,
    "allowed": allowed,
}


def proved_by(names: Iterable[str]) -> str:
    """Return the kinds of proof: runs on the CPU, on a card, or nothing yet."""
    given = [row for row in ROWS if row.id in set(names)]
    kinds = []
    if given:
        kinds.append("CPU row, replacement" if all(map(_is_replaced, given)) else "CPU row")
    if SEEN_ON_A_CARD & set(names):
        kinds.append("card")
    return ", ".join(kinds) or _NOTHING


def _is_replaced(row: Row) -> bool:
    """Return whether the row runs with replacements for parts that need a GPU."""
    return not REPLACED.keys().isdisjoint((row.flags + row.fsep).split())


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names if name) or _NONE


def _allowed_by(word: str) -> list[str]:
    return [
        f"{item.flag} {value}"
        for item in REFUSALS
        if word in item.words
        for value in item.unproven_values
    ]


def main(arguments: list[str]) -> int:
    """Write the figures of these results, keep other rows' figures, and report rows without any."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="junit XML files of pytest")
    options = parser.parse_args(arguments)
    figures = read_figures()
    for results in options.results:
        figures.update(figures_in(results))
    write_figures(figures)
    missing = [row.id for row in ALL_ROWS if not any(figures.get(row.id, []))]
    if missing:
        print(f"no figures for {len(missing)} rows: {' '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
