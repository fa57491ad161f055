"""docs/support.md, written from the parity table, the refusals and the figures of test runs.

    python -m pytest tests/distributed/test_parity.py --junitxml results.xml
    python -m tests.parity.report results.xml …

Everything on the page but the figures follows from the code, so a unit test can tell whether it is
up to date: `render(figures_on(page)) == page`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from megatron_laer.releases import NUMBERS, RELEASES
from megatron_laer.support.fields import WITHOUT_EFFECT_BY_REASON
from megatron_laer.support.refusal import Refusal
from megatron_laer.support.table import REFUSALS, UNPROVEN
from tests.parity.compare import Distance
from tests.parity.features import ALLOW, FEATURES, REPLACED, SEEN_ON_A_CARD
from tests.parity.row import FLOOR_FACTOR, Row
from tests.parity.rows import ROWS, daily

TEMPLATE = Path(__file__).with_name("support_page.md")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"

_NONE = "–"
_NOTHING = "nothing yet"
_NAMES = {row.id: row.name for row in ROWS}
_SETTINGS = {item.setting for item in REFUSALS}
_COLUMNS = ("gradients", "losses", "norms", "weights", "MoE losses")


@dataclass(frozen=True)
class Figures:
    """What a run of a row measured, as the page shows it: (distance, floor) by column."""

    cells: tuple[str, ...]

    @property
    def measured(self) -> bool:
        """Whether there is any."""
        return any(cell != _NONE for cell in self.cells)

    @classmethod
    def of(cls, found: Distance, floor: Distance, row: Row) -> Figures:
        """Cells without meaning for the row are left out."""
        logs = "--moe-aux-loss-coeff" in row.flags
        shows = (row.gradients, True, row.steps > 0, row.steps > 0, logs)
        pairs = zip(found.parts(), floor.parts(), shows, strict=True)
        return cls(tuple(f"{a:.1e} ({b:.1e})" if shown else _NONE for a, b, shown in pairs))


BLANK = Figures((_NONE,) * len(_COLUMNS))


def figures_in(results: Path) -> dict[str, Figures]:
    """Figures by row's name, from pytest's `--junitxml`.

    Raises:
        ValueError: a row failed: a page must not show figures of a run that proves nothing.
    """
    rows = {row.name: row for row in ROWS}
    found: dict[str, Figures] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        values = {item.get("name"): item.get("value") or "" for item in case.iter("property")}
        if case.find("failure") is not None or case.find("error") is not None:
            raise ValueError(f"{results}: {case.get('name')} failed; its row must pass first")
        name = values.get("row")
        if name in rows:
            distances = (_distance(values["fsep"]), _distance(values["floor"]))
            found[name] = Figures.of(*distances, rows[name])
    return found


def _distance(text: str) -> Distance:
    words = text.split()
    return Distance(
        **{name: float(part) for name, part in zip(words[::2], words[1::2], strict=True)}
    )


def figures_on(page: str) -> dict[str, Figures]:
    """Figures by row's name, from a page."""
    lines = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| "))
    width = 3 + len(_COLUMNS)
    return {
        cells[0]: Figures(tuple(cells[3:]))
        for cells in lines
        if len(cells) == width and cells[0] != "row"
    }


def render(figures: Mapping[str, Figures]) -> str:
    """The page. Rows without figures are listed without."""
    heads = " | ".join(f"{column} (floor)" for column in _COLUMNS)
    rows = (
        f"| {row.name} | {row.ranks} | {row.steps} | "
        + " | ".join(figures.get(row.name, BLANK).cells)
        + " |"
        for row in ROWS
    )
    refusals = (
        f"| `{item.setting}` | {_code(item.field)} | {item.reason} | {_way_out(item)} |"
        for item in REFUSALS
    )
    without_effect = (
        f"| {_code(*fields.split())} | {reason} |"
        for reason, fields in WITHOUT_EFFECT_BY_REASON.items()
    )
    features = (
        f"| {feature} | {' | '.join(status(names))} | {_listed(names)} |"
        for feature, names in FEATURES.items()
    )
    allowed = (
        f"| `{word}` | {text} | {_code(*_allowed_by(word))} | {proved_by([f'{ALLOW} {word}'])} |"
        for word, text in UNPROVEN.items()
    )
    return TEMPLATE.read_text(encoding="utf-8").format(
        proved=len(ROWS),
        refused=len(REFUSALS),
        newest=NUMBERS[-1],
        oldest=NUMBERS[0],
        limits="\n".join(
            f"Megatron {release.number} {release.limits}." for release in RELEASES if release.limits
        ),
        releases=sum(row.releases for row in ROWS),
        factor=FLOOR_FACTOR,
        covered=len(ROWS) - len(daily()),
        features="\n".join(features),
        heads=heads,
        dashes="|".join("---" for _ in range(3 + len(_COLUMNS))),
        rows="\n".join(rows),
        replaced=", ".join(REPLACED.values()),
        refusals="\n".join(refusals),
        allowed="\n".join(allowed),
        without_effect="\n".join(without_effect),
    )


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names if name) or _NONE


def status(names: Collection[str]) -> tuple[str, str]:
    """Whether a feature with these rows, refusals and words is proved, and by what."""
    by = proved_by(names)
    if names and all(name in _SETTINGS for name in names):
        return "refused", _NONE
    return "unproven" if by == _NOTHING else "proved", by


def proved_by(names: Iterable[str]) -> str:
    """What has shown that all of this is right: runs on the CPU, on a card, or nothing yet."""
    given = [set((row.flags + row.fsep).split()) for row in ROWS if row.id in set(names)]
    kinds = []
    if given:
        is_replaced = all(flags & REPLACED.keys() for flags in given)
        kinds.append("CPU row, replacement" if is_replaced else "CPU row")
    if SEEN_ON_A_CARD & set(names):
        kinds.append("card")
    return ", ".join(kinds) or _NOTHING


def _allowed_by(word: str) -> list[str]:
    return [
        f"{item.flag} {value}"
        for item in REFUSALS
        if item.unproven == word
        for value in item.unproven_values
    ]


def _way_out(item: Refusal) -> str:
    if item.unproven is None:
        return item.said_way_out
    values = " or ".join(item.unproven_values)
    return f"{item.said_way_out}; {values} with {ALLOW} {item.unproven}"


def _listed(names: Iterable[str]) -> str:
    return "; ".join(f"`{name}`" if name.startswith("--") else _NAMES[name] for name in names)


def main(arguments: list[str]) -> int:
    """Write the page with the figures of these results; rows not in them keep what they have.

    Complains of rows that have no figures at all.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.parity.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="junit XML files of pytest")
    options = parser.parse_args(arguments)
    figures = figures_on(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for results in options.results:
        figures.update(figures_in(results))
    missing = [row.name for row in ROWS if not figures.get(row.name, BLANK).measured]
    PAGE.write_text(render(figures), encoding="utf-8")
    if missing:
        print(f"no figures for {len(missing)} rows: {'; '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
