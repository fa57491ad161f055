"""Files of `shared/data` next to the checkout, which not every machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def needs(name: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test where the file is not there, and says how it gets there."""
    path = FOLDER / name
    reason = f"no file {path}: link the folder `shared` next to the checkout"
    return pytest.mark.skipif(not path.exists(), reason=reason)
