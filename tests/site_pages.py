"""Tables in the pages of docs/ that follow from the code.

`python -m tests.site_pages` writes them, each between two marks on its page; a unit test says
whether they are up to date.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_laer.environment import VARIABLES
from megatron_laer.flags import add_arguments
from megatron_laer.plugin.command_line import ARGUMENT_PATCHES
from megatron_laer.plugin.switch import FSEP_PATCHES
from megatron_laer.releases import NEXT, RELEASES
from megatron_laer.support.refusal import Refusal
from megatron_laer.support.table import REFUSALS
from tests import compatibility
from tests.error_messages import SLURM
from tests.errors_page import errors

DOCS = Path(__file__).resolve().parents[1] / "docs"


def flags() -> Iterator[str]:
    """Every flag, what it takes and what it does, as `--help` says it."""
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    yield "| flag | takes | |"
    yield "|---|---|---|"
    for action in parser._actions:
        words = " ".join(f"`{word}`" for word in action.choices or ())
        kind = getattr(action.type, "__name__", "str")
        takes = words or {"str": "text", "int": "an integer", "float": "a number"}[kind]
        several = ", several" if action.nargs == "+" else ""
        text = (action.help or "").replace("%%", "%")
        yield _row(f"`{action.option_strings[0]}`", takes + several, text)


def refusals() -> Iterator[str]:
    """Every setting of Megatron that is refused, why, and what would work."""
    yield "| refused, as a flag and as a field of TransformerConfig | because | what works |"
    yield "|---|---|---|"
    for row in REFUSALS:
        field = f", `{row.field}`" if row.field and row.field != row.setting else ""
        yield _row(f"`{row.setting}`{field}", *_said(row))


def releases() -> Iterator[str]:
    """Every release of Megatron that is supported, and the one to come."""
    yield "| Megatron | tested with | |"
    yield "|---|---|---|"
    for row in RELEASES:
        yield _row(row.number, ", ".join(row.tested), row.limits or "all of it")
    asked = f"refused unless `MEGATRON_LAER_UNRELEASED_MEGATRON={NEXT.number}`"
    yield _row(f"{NEXT.number} (main)", ", ".join(NEXT.tested), asked)


def patches() -> Iterator[str]:
    """Every attribute of Megatron that is replaced, and what for."""
    yield "| replaced in `megatron` | what it does |"
    yield "|---|---|"
    for patch in (*ARGUMENT_PATCHES, *FSEP_PATCHES):
        name = f"{patch.module}.{patch.path}".removeprefix("megatron.")
        yield _row(f"`{name}`", patch.reason)


def environment() -> Iterator[str]:
    """Every variable of the environment that is read, and who sets it."""
    yield "| variable | set by | |"
    yield "|---|---|---|"
    for variable in VARIABLES:
        yield _row(f"`{variable.name}`", variable.owner, variable.meaning)


def slurm_settings() -> Iterator[str]:
    """The settings of the batch script for Slurm, as its head lists them."""
    text = SLURM.read_text(encoding="utf-8")
    listed = re.findall(
        r"^#   ([A-Z_]+(?:, [A-Z_]+)*) +(\S.*(?:\n# {19}\S.*)*)", text, re.MULTILINE
    )
    yield "| variable | |"
    yield "|---|---|"
    for names, meaning in listed:
        code = ", ".join(f"`{name}`" for name in names.split(", "))
        yield _row(code, re.sub(r"\s*\n#\s+", " ", meaning))


TABLES: dict[tuple[str, str], Callable[[], Iterable[str]]] = {
    ("flags.md", "flags"): flags,
    ("flags.md", "environment"): environment,
    ("fork.md", "patches"): patches,
    ("slurm.md", "settings"): slurm_settings,
    ("troubleshooting.md", "refusals"): refusals,
    ("compatibility.md", "releases"): releases,
    ("compatibility.md", "combinations"): compatibility.combinations,
    ("compatibility.md", "versions"): compatibility.versions,
    ("errors.md", "errors"): errors,
}


def with_table(page: str, name: str, lines: Iterable[str]) -> str:
    """Return the page with these lines between the marks of this name.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name}, by python -m tests.site_pages -->\n", "<!-- end -->"
    table = "\n".join(lines) + "\n"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    written, number = re.subn(pattern, lambda _: begin + table + end, page, flags=re.DOTALL)
    if number != 1:
        raise ValueError(
            f"{begin.strip()} … {end}: once on the page, and it is there {number} times"
        )
    return written


def main() -> None:
    """Write every table into its page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--passed", metavar="TESTS", help="how a set was started that has passed")
    passed = parser.parse_args().passed
    if passed and compatibility.record(compatibility.here(passed)):
        print("tests/tested.csv has a new row: commit it with docs/compatibility.md")
    for (page, name), table in TABLES.items():
        path = DOCS / page
        path.write_text(with_table(path.read_text("utf-8"), name, table()), encoding="utf-8")


def _said(row: Refusal) -> tuple[str, str]:
    allow = f", or `--fsep-allow-unproven {row.unproven}`" if row.unproven else ""
    return row.reason, row.said_way_out + allow


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
