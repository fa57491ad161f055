"""The rows of the parity table are written into the package, with the features that each has.

    python -m tests.proved_rows

writes `megatron_laer/tools/recipes/rows.py`; a unit test compares that file with today's table.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_laer.tools.recipes.features import features_of
from tests.parity.features import REPLACED
from tests.parity.rows import ROWS, Row

FILE = Path(__file__).resolve().parents[1] / "megatron_laer" / "tools" / "recipes" / "rows.py"

_HEAD = '''\
"""The rows of the parity table, with the features that each has; `python -m tests.proved_rows`."""

# A row has a line.
# ruff: noqa: E501
# fmt: off

from __future__ import annotations

from typing import NamedTuple


class ProvedRow(NamedTuple):
    """Describes a row of the parity table."""

    name: str
    features: frozenset[str]
    is_replaced: bool


def _row(name: str, features: str = "", is_replaced: bool = False) -> ProvedRow:
    return ProvedRow(name, frozenset(features.split(", ") if features else ()), is_replaced)


ROWS = (
'''


def text() -> str:
    """The file of today."""
    return "".join([_HEAD, *(f"    {_line(row)},\n" for row in ROWS), ")\n"])


def settings_of(row: Row) -> Namespace:
    """The settings of a row's run under test, by Megatron's names."""
    found: dict[str, Any] = {"is_lora": "lora" in getattr(row.adapt, "__name__", "")}
    flag = ""
    for word in row.fsep_run("data")[1]:
        if word.startswith("--"):
            flag = word.removeprefix("--").replace("-", "_")
            found[flag] = True
        else:
            found[flag] = _with(found[flag], word)
    switches = {"add_bias_linear": "disable_bias_linear" not in found}
    switches |= {"swiglu": "swiglu" in found, "quick_geglu": "quick_geglu" in found}
    return Namespace(**found | switches)


def _with(before: Any, word: str) -> Any:
    """A flag's value with one more word."""
    if before is True:
        return word
    return [*before, word] if isinstance(before, list) else [before, word]


def _line(row: Row) -> str:
    words = [f'"{row.name}"', f'"{", ".join(sorted(features_of(settings_of(row))))}"']
    if set((row.flags + row.fsep).split()) & REPLACED.keys():
        words.append("True")
    return f"_row({', '.join(words)})" if words[1:] != ['""'] else f"_row({words[0]})"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
