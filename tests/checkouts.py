"""Checkouts of other projects, in folders that variables of the environment name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def checkout(variable: str, project: str) -> tuple[Path, list[pytest.MarkDecorator]]:
    """Return the folder, and marks of tests that need it: nightly, and skipped without one."""
    folder = os.environ.get(variable)
    reason = f"{variable} names no checkout of {project}"
    without = pytest.mark.skipif(folder is None, reason=reason)
    return Path(folder or "").resolve(), [pytest.mark.nightly, without]
