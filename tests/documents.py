"""Fenced blocks of the README and of other pages, for the tests that run them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "patches" / "README.md",
)
FOLDERS = (
    *(".ci", ".github", "benchmarks", "configs", "docs", "megatron_laer", "patches", "scripts"),
    "tests",
)

# Languages of blocks that are run.
COMMANDS, SCRIPT = "bash", "python"
# Languages that are only shown. Those in braces make the site: its contents, and the Python
# interface.
SHOWN = frozenset({"text", "csv", "yaml", "json", "{toctree}", "{eval-rst}"})

_FENCE = re.compile(r"^```([\w{}-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_PROGRAMS = "torchrun python pip sbatch srun scontrol bash megatron-laer scripts/ ./scripts/"


def project_files() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for folder in FOLDERS:
        yield from (path for path in ROOT.joinpath(folder).rglob("*") if path.is_file())


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 1)
        for match in _FENCE.finditer(text)
    ]


def inline_commands(page: Path) -> list[str]:
    """Return commands in running text and tables: texts in backticks that start with a program."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    starts = tuple(f"{name}" if name.endswith("/") else f"{name} " for name in _PROGRAMS.split())
    return [code for code in _INLINE.findall(text) if code.startswith(starts)]
