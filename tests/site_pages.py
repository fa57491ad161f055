"""Texts of pages and other files that follow from the code.

`python -m tests.site_pages` writes them, tables in docs/ between two marks each, and `--check`
names those that are old.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator

from megatron_laer.fsep_flags import add_arguments
from megatron_laer.life import LIFE, Kind
from megatron_laer.plugin.command_line import ARGUMENT_PATCHES
from megatron_laer.plugin.switch import FSEP_PATCHES
from megatron_laer.releases import NEXT, RELEASES
from tests import compatibility
from tests.documents import ROOT
from tests.parity import report
from tests.releases import PLACES

DOCS = ROOT / "docs"
SLURM = ROOT / "scripts" / "slurm" / "pretrain.sbatch"


def flags() -> Iterator[str]:
    formatter = argparse.HelpFormatter("")
    group = add_arguments(argparse.ArgumentParser(add_help=False))._action_groups[-1]
    yield "| flag | |"
    yield "|---|---|"
    for action in group._group_actions:
        takes = formatter._format_args(action, action.dest.removeprefix("fsep_").upper())
        given = " ".join([*action.option_strings, takes])
        yield _row(f"`{given}`" if action.option_strings else f"… `{given.strip()}`", _text(action))


def _text(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%")


def releases() -> Iterator[str]:
    yield "| Megatron | tested with | |"
    yield "|---|---|---|"
    for row in RELEASES:
        yield _row(row.number, ", ".join(row.tested), row.limits or "all of it")
    asked = f"refused unless `MEGATRON_LAER_UNRELEASED_MEGATRON={NEXT.number}`"
    yield _row(f"{NEXT.number} (main)", ", ".join(NEXT.tested), asked)


def patches() -> Iterator[str]:
    yield "| replaced in `megatron` | effect |"
    yield "|---|---|"
    for patch in (*ARGUMENT_PATCHES, *FSEP_PATCHES):
        name = f"{patch.module}.{patch.path}".removeprefix("megatron.")
        yield _row(f"`{name}`", patch.reason)


def slurm_settings() -> Iterator[str]:
    text = SLURM.read_text(encoding="utf-8")
    listed = re.findall(
        r"^#   ([A-Z_]+(?:, [A-Z_]+)*) +(\S.*(?:\n# {19}\S.*)*)", text, re.MULTILINE
    )
    yield "| variable | |"
    yield "|---|---|"
    for names, meaning in listed:
        code = ", ".join(f"`{name}`" for name in names.split(", "))
        yield _row(code, re.sub(r"\s*\n#\s+", " ", meaning))


def life() -> Iterator[str]:
    yield "| event | plain | by kind of run |"
    yield "|---|---|---|"
    for event, rows in LIFE.items():
        cells = {
            " and ".join(kind.value for kind in Kind if kind in kinds): ", ".join(
                action.value for action in cell
            )
            or "–"
            for kinds, cell in rows.items()
        }
        plain = cells.pop("", "")
        yield _row(event.value, plain, "; ".join(f"*{kinds}*: {cells[kinds]}" for kinds in cells))


TABLES: dict[tuple[str, str], Callable[[], Iterable[str]]] = {
    ("internals/architecture.md", "life"): life,
    ("settings.md", "flags"): flags,
    ("megatron.md", "patches"): patches,
    ("slurm.md", "settings"): slurm_settings,
    ("support.md", "releases"): releases,
    ("support.md", "combinations"): compatibility.combinations,
    **{("support.md", name): lines for name, lines in report.TABLES.items()},
}


def with_text(content: str, pattern: str, text: str) -> str:
    """Return a file with this text for the pattern's group; ValueError unless it is there once."""
    found = [*re.finditer(pattern, content, re.MULTILINE)]
    if len(found) != 1:
        raise ValueError(f"{pattern}: once in the file, and it is there {len(found)} times")
    (at,) = found
    return content[: at.start(1)] + text + content[at.end(1) :]


def old(write: bool = False) -> list[str]:
    """Return the texts that the code would change, as `file: name`, and write them if asked."""
    texts = [(file, *place) for file, place in PLACES.items()]
    for (page, name), lines in TABLES.items():
        begin = re.escape(f"<!-- {name}, by python -m tests.site_pages -->\n")
        pattern = f"{begin}((?s:.*?))<!-- end -->"
        texts.append((f"docs/{page}", pattern, "\n".join(lines()) + "\n"))
    found = []
    for file, pattern, text in texts:
        content = (ROOT / file).read_text(encoding="utf-8")
        if (new := with_text(content, pattern, text)) != content:
            found.append(f"{file}: {pattern.partition(',')[0]}")
            if write:
                (ROOT / file).write_text(new, encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passed", metavar="TESTS", help="how a set was started that has passed")
    parser.add_argument("--check", action="store_true", help="write nothing; fail for old tables")
    options = parser.parse_args()
    if options.passed and compatibility.record(compatibility.here(options.passed)):
        print("tests/tested.csv has a new row: commit it with docs/support.md")
    found = old(write=not options.check)
    print("\n".join(found))
    if options.check and found:
        raise SystemExit(1)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
