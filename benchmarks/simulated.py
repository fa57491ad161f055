"""Runs of `simulate` by benchmarks: the cases of its JSON."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_laer.tools import cli


def simulated(words: Sequence[str]) -> list[dict[str, Any]]:
    """Return the cases of `simulate` with these words.

    Raises RuntimeError with what the command says if it fails.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        path = Path(folder) / "simulated.json"
        with contextlib.redirect_stderr(said):
            status = cli.main(["simulate", *words, "--json", str(path)])
        if status != 0:
            raise RuntimeError(f"simulate {' '.join(words)}: {said.getvalue()}")
        cases: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return cases
