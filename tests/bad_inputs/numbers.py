"""Options that take a number, each with every text that is no number, or no allowed one.

Commands' options are found by their types. A row is an option, a column a kind of text. Daily tests
try every sixteenth pair of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_laer.files.checks import one_line
from megatron_laer.tools import cli
from megatron_laer.tools.cli.argument_types import between, number
from tests.bad_inputs.case import Case

_EVERY = 16
_SHOWN = 40

NO_INTEGERS = {
    "nothing": "",
    "blank": " ",
    "blanks around": " 7 ",
    "newline": "7\n",
    "sign": "+7",
    "negative": "-7",
    "minus alone": "-",
    "hexadecimal": "0x10",
    "underscore": "1_0",
    "exponent": "1e1",
    "fraction": "7.0",
    "comma": "7,8",
    "Arabic digit": "\u0667",
    "fullwidth digit": "\uff17",
    "superscript": "\u00b2",
    "many digits": "9" * 5000,
    "10^18": str(10**18),
    "2^63": str(2**63),
    "-2^63": str(-(2**63)),
    "nan": "nan",
    "infinity": "inf",
    "boolean": "true",
    "nothing of Python": "None",
    "list": "[7]",
    "command": "$(touch ran)",
    "escapes": "7\x1b[2J",
    "bidi": "7\u202e8",
    "bytes": "7\udce9",
    "zeros": "0" * 400 + "x",
}
NO_NUMBERS = {
    "nothing": "",
    "nan": "nan",
    "negative nan": "-nan",
    "infinity": "inf",
    "negative infinity": "-inf",
    "too large": "1e999",
    "far too large": "1e308",
    "negative": "-1",
    "hexadecimal": "0x1p3",
    "comma": "1,5",
    "two points": "1.5.2",
    "list": "[1]",
    "percent": "50%",
    "unit": "1h",
    "boolean": "false",
    "many digits": "9" * 5000,
    "escapes": "1\x1b[2J",
    "bidi": "1\u202e5",
    "bytes": "1\udce9",
}
COMMANDS = ("plan", "simulate", "advise", "report", "calibrate")
# Programs make their parsers when they run.
INTEGERS = {
    "benchmarks/end_to_end.py": "repeats steps",
    "benchmarks/planner.py": "offset",
    "benchmarks/gpu/__main__.py --dry-run": "ranks nodes port",
    "scripts/paper/figure8.py --toy --dry-run": "steps",
    "scripts/quickstart.py": "steps",
}
NUMBERS = {"benchmarks/gpu/__main__.py --dry-run": "minutes"}


def options() -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Yield commands with an option of each, and the texts that are wrong for its type."""
    for maker, texts, programs in (
        (between, NO_INTEGERS, INTEGERS),
        (number, NO_NUMBERS, NUMBERS),
    ):
        for command in COMMANDS:
            for action in cli._parsers(command)[1]._actions:
                if getattr(action.type, "__qualname__", "").startswith(f"{maker.__name__}."):
                    yield command, action.option_strings[0], texts
        for words, names in programs.items():
            yield from ((words, f"--{name}", texts) for name in names.split())


def cases() -> Iterator[Case]:
    for row, (words, option, texts) in enumerate(options()):
        for column, text in enumerate(texts.values()):
            yield Case(
                (*words.split(" "), f"{option}={text}"),
                one_line(text)[:_SHOWN],
                nightly=(row + column) % _EVERY != 0,
            )
