"""Command lines that cannot work, and the message expected for each.

`values` makes those that follow from types and kinds of files, and `drawn` those of a seed.
`cases.txt` lists the rest:

    # WORDS with which the lines below begin
    NAME=VALUE WORDS => PART OF THE MESSAGE

NAME is a variable of the environment. `''` is an empty word, and escapes are Python's. Files are
those of `make`, in the folder that the command runs in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from tests.bad_inputs import drawn, inputs, published, recordings, values
from tests.bad_inputs.case import Case
from tests.parity.flags import command_line

_TABLE = Path(__file__).with_name("cases.txt")
_SCRIPT = str(Path(__file__).resolve().parents[2] / "pretrain_gpt.py")
# With these a run of 8 experts on 2 ranks would start.
_FLAGS = command_line("absent", steps=1)
_RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
_TEXTS = {"script": _SCRIPT, "longest": "x" * 6000}


def every_case() -> list[Case]:
    cases: dict[tuple[object, ...], Case] = {}
    for case in _all():
        cases.setdefault(case.key, case)
    return list(cases.values())


def _all() -> Iterator[Case]:
    yield from _listed()
    for name, (_, says) in inputs.YAML.items():
        yield Case(("flags", f"yaml-{name}.yaml"), says)
    for name, (_, says) in inputs.MODELS.items():
        yield Case(("flags", f"model-{name}.yaml"), says)
    for name, (_, says) in inputs.SIZES.items():
        yield Case(("plan", "good.trace", "--config", f"sizes-{name}.yaml"), says)
    for name, (_, says) in inputs.pickles().items():
        yield Case(("inspect", f"checkpoint-{name}"), says)
    train = ("train", _SCRIPT, "--", *_FLAGS, "--expert-parallel-mode", "fsep")
    for number, (given, says) in enumerate(values.settings()):
        yield Case((*train, *shlex.split(given)), says, _RANKS, nightly=number % 4 > 0)
    yield from values.paths()
    yield from values.variables()
    yield from (found.case for found in drawn.drawn(train, _RANKS))


def _listed() -> Iterator[Case]:
    first: list[str] = []
    for number, line in enumerate(_TABLE.read_text(encoding="utf-8").splitlines()):
        if line.startswith("#"):
            first = line.removeprefix("#").split()
        elif line:
            given, _, says = line.partition("=>")
            # Cases run at once, and two that write one output would refuse each other.
            texts = _TEXTS | {"number": str(number)}
            words, environment = [], _RANKS if "{flags}" in first else {}
            for word in [*first, *given.split()]:
                text = "" if word == "''" else word.encode().decode("unicode_escape")
                name, sign, value = text.format(flags="", **texts).partition("=")
                if word == "{flags}":
                    words += _FLAGS
                elif sign and re.fullmatch("[A-Z_]+", name):
                    environment = environment | {name: value}
                else:
                    words.append(name + sign + value)
            yield Case(tuple(words), says.strip(), environment)


def make(folder: Path) -> None:
    for part in (inputs, recordings, published, values, drawn):
        part.make(folder)


def content(folder: Path) -> Iterator[tuple[str, str]]:
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            found = path.lstat()
            told = f"{found.st_mode} {found.st_size} {found.st_ino}"
            if stat.S_ISREG(found.st_mode):
                told += f" {found.st_mtime_ns}"
                if found.st_size < inputs.HUGE:
                    told += hashlib.blake2b(path.read_bytes()).hexdigest()
            yield str(path.relative_to(folder)), told
