"""Runs of `simulate` by benchmarks: its JSON."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_laer.tools import cli
from megatron_laer.tools.cli import prediction_input
from megatron_laer.tools.simulator.iteration.rates import rate_sets

# What would be chosen by memory and by time, unless words say it.
_FIXED = "--recompute none --stock-dispatcher flex".split()


def simulated(words: Sequence[str], *, ranges: bool = True) -> dict[str, Any]:
    """Return the JSON of `simulate` with these words; without `ranges` in a fifth of the time.

    Raises RuntimeError with what the command says if it fails.
    """
    sets = rate_sets if ranges else lambda rates: (rates,)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()) as said,
        mock.patch.object(prediction_input, "rate_sets", sets),
    ):
        path = Path(folder) / "simulated.json"
        with contextlib.redirect_stderr(said):
            status = cli.main(["simulate", *_FIXED, *words, "--json", str(path)])
        if status != 0:
            raise RuntimeError(f"simulate {' '.join(words)}: {said.getvalue()}")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
