"""Reader of Dockerfiles as instructions, for tests that need no daemon."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.documents import ROOT

DOCKERFILES = sorted((ROOT / "scripts" / "docker").glob("*Dockerfile"))
_OPTION = re.compile(r"--([a-z]+)=(\S+)\s+")


@dataclass(frozen=True)
class Instruction:
    """One instruction, without its options, whose `mount` may occur more than once.

    The text has line ends as a shell sees them; `stage` counts FROM instructions, itself included.
    """

    name: str
    text: str
    options: dict[str, list[str]]
    stage: int

    @property
    def mounts(self) -> list[dict[str, str]]:
        given = self.options.get("mount", [])
        return [dict(pair.split("=", 1) for pair in mount.split(",")) for mount in given]


def moved(text: str, folders: Mapping[str, Path]) -> str:
    """Return an image's command with folders such as /tmp replaced by writable ones."""
    known = re.compile(rf"(?<![\w.-])({'|'.join(folders)})(?![\w-])")
    return known.sub(lambda found: str(folders[found[1]]), text)


def instructions(path: Path) -> list[Instruction]:
    """Return the instructions of a file; ValueError for a line without a word in capitals."""
    found: list[Instruction] = []
    lines = [line for line in path.read_text("utf-8").splitlines() if not re.match(r"\s*#", line)]
    for text in "\n".join(lines).replace("\\\n", "\\\v").split("\n"):
        if not text.strip():
            continue
        match = re.fullmatch(r"([A-Z]+)\s+(.*)", text, re.DOTALL)
        if match is None:
            raise ValueError(f"{path}: {text!r} begins with no instruction")
        rest, options = match[2].replace("\v", "\n"), dict[str, list[str]]()
        while option := _OPTION.match(rest):
            options.setdefault(option[1], []).append(option[2])
            rest = rest[option.end() :].removeprefix("\\\n").lstrip()
        stage = sum(instruction.name == "FROM" for instruction in found) + (match[1] == "FROM")
        found.append(Instruction(match[1], rest, options, stage))
    return found
