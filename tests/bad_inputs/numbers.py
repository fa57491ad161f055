"""Options that take a number, each with every text that is no number, or no allowed one.

A row is an option, a column a kind of text. Daily tests try every sixteenth pair of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_laer.files.checks import one_line
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
_MODEL = "--model mixtral-8x7b-e8k2"
INTEGERS = {
    "plan good.trace": "ranks capacity node-size experts lag hidden ffn every",
    "plan --workload W1 --experts 8": "ranks tokens topk steps",
    f"simulate good.trace {_MODEL}": "ranks node-size capacity tokens lag steps "
    "microbatches pipeline virtual-pipeline tensor-parallel world "
    "stock-expert-parallel",
    f"advise good.trace {_MODEL} --gpus 4": "gpus tokens microbatches pipeline "
    "virtual-pipeline tensor-parallel",
    "report measured": "group cases capacity node-size",
    "calibrate out/c.yaml": "node-size hidden ffn",
    "benchmarks/end_to_end.py": "repeats steps",
    "benchmarks/planner.py": "offset",
    "benchmarks/gpu/__main__.py --dry-run": "ranks nodes port",
    "scripts/paper/figure8.py --toy --dry-run": "steps",
    "scripts/quickstart.py": "steps",
}
NUMBERS = {
    "plan good.trace": "tolerance hours",
    f"simulate good.trace {_MODEL}": "peak-tflops memory-gib hours host-gap-ms",
    f"advise good.trace {_MODEL} --gpus 4": "memory-gib hours host-gap-ms",
    "report measured": "hours",
    "calibrate out/c.yaml": "hours",
    "benchmarks/gpu/__main__.py --dry-run": "minutes",
}


def cases() -> Iterator[Case]:
    for options, texts in ((INTEGERS, NO_INTEGERS), (NUMBERS, NO_NUMBERS)):
        pairs = ((words, name) for words, names in options.items() for name in names.split())
        for row, (words, name) in enumerate(pairs):
            for column, text in enumerate(texts.values()):
                yield Case(
                    (*words.split(" "), f"--{name}={text}"),
                    one_line(text)[:_SHOWN],
                    nightly=(row + column) % _EVERY != 0,
                )
