"""Command lines that cannot work, and the message expected for each.

Those of the other files follow from tables. `cases.txt` lists the rest:

    # WORDS with which the lines below begin
    NAME=VALUE WORDS => PART OF THE MESSAGE

NAME is a variable of the environment. `''` is an empty word, and escapes are Python's. Files are
those of `inputs`, in the folder that the command runs in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.bad_inputs import (
    advise,
    batch,
    fields,
    inputs,
    numbers,
    paths,
    programs,
    recordings,
    report,
    simulate,
    variables,
)
from tests.bad_inputs.case import Case
from tests.parity.flags import command_line

_TABLE = Path(__file__).with_name("cases.txt")
_SCRIPT = str(Path(__file__).resolve().parents[2] / "pretrain_gpt.py")
# With these a run of 8 experts on 2 ranks would start.
_FLAGS = command_line("absent", steps=1)
_RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
_TEXTS = {"script": _SCRIPT, "long": "x" * 300, "longest": "x" * 6000, "digits": "9" * 5000}


def every_case() -> list[Case]:
    cases: dict[tuple[object, ...], Case] = {}
    for case in _all():
        cases.setdefault(case.key, case)
    return list(cases.values())


def _all() -> Iterator[Case]:
    yield from _listed()
    yield from _yaml_cases()
    for words, says in report.CASES:
        yield Case(("report", *words.split(" ")) if words else ("report",), says)
    yield from simulate.cases()
    yield from advise.cases()
    for name, (_, says) in inputs.pickles().items():
        yield Case(("inspect", f"checkpoint-{name}"), says)
    for part in (programs, paths, numbers, fields, variables, batch, recordings):
        yield from part.cases()


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


def _yaml_cases() -> Iterator[Case]:
    shared = [(f"yaml-{name}", says) for name, (_, says) in inputs.YAML.items()]
    shared += [
        ("yaml-latin", "is not UTF-8"),
        ("yaml-utf16", "is not UTF-8"),
        ("yaml-sparse", "has 68,719,476,736 bytes; at most 65,536"),
        ("yaml-pipe", "is a pipe"),
        ("yaml-folder", "is a folder"),
        ("absent", "absent.yaml"),
    ]
    for name, says in shared:
        yield Case(("flags", f"{name}.yaml"), says)
        yield Case(("plan", "good.trace", "--cluster", f"{name}.yaml"), says)
    for name, (_, says) in inputs.MODELS.items():
        yield Case(("flags", f"model-{name}.yaml"), says)
    for name, says in (*shared[:4], ("model-off", "swiglu is 'false'")):
        yield Case(("plan", "good.trace", "--config", f"{name}.yaml"), says)
    for name, (_, says) in inputs.SIZES.items():
        yield Case(("plan", "good.trace", "--config", f"sizes-{name}.yaml"), says)
    for name, (_, _, says) in inputs.CLUSTERS.items():
        yield Case(("plan", "good.trace", "--cluster", f"cluster-{name}.yaml"), says)
