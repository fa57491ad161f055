"""The rows of the parity table with their features, as a file of the package.

    python -m tests.proved_rows

writes `megatron_laer/tools/recipes/proved_rows.csv`; a unit test compares it with today's table.
"""

from __future__ import annotations

import csv
import io

from megatron_laer.tools.recipes.features import features_of
from megatron_laer.tools.recipes.proof import FILE
from tests.parity.features import REPLACED
from tests.parity.rows import ROWS
from tests.parity.settings import settings_of


def text() -> str:
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    for row in ROWS:
        is_replaced = bool(set((row.flags + row.fsep).split()) & REPLACED.keys())
        features = ", ".join(sorted(features_of(settings_of(row))))
        rows.writerow([row.id, features, is_replaced or ""])
    return written.getvalue()


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
