"""The rows of the parity table with their features, as a file of the package.

    python -m tests.proved_rows

writes `megatron_laer/tools/recipes/proved_rows.csv`; a unit test compares it with today's table.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from megatron_laer.tools.recipes.features import features_of
from megatron_laer.tools.recipes.proof import FILE
from tests.parity import bridge_lora
from tests.parity.features import REPLACED
from tests.parity.row import Row
from tests.parity.rows import ROWS


def text() -> str:
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    for row in ROWS:
        is_replaced = bool(set((row.flags + row.fsep).split()) & REPLACED.keys())
        features = ", ".join(sorted(features_of(settings_of(row))))
        rows.writerow([row.name, features, is_replaced or ""])
    return written.getvalue()


def settings_of(row: Row) -> Namespace:
    return settings_in(
        row.fsep_run("data")[1],
        is_lora="lora" in getattr(row.adapt, "__name__", ""),
        adapts_experts=getattr(row.adapt, "__module__", "") == bridge_lora.__name__,
    )


def settings_in(command: Iterable[str], **found: Any) -> Namespace:
    """Return a command line's settings, with these others."""
    flag = ""
    for word in command:
        if word.startswith("--"):
            flag = word.removeprefix("--").replace("-", "_")
            found[flag] = True
        else:
            found[flag] = _with(found[flag], word)
    switches = {"add_bias_linear": "disable_bias_linear" not in found}
    switches |= {"swiglu": "swiglu" in found, "quick_geglu": "quick_geglu" in found}
    return Namespace(**found | switches)


def _with(before: Any, word: str) -> Any:
    if before is True:
        return word
    return [*before, word] if isinstance(before, list) else [before, word]


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
