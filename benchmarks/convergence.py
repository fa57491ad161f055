"""Compares how models learn real text with FSEP and with stock expert parallelism.

Usage: `python -m benchmarks.convergence --help`; docs/performance.md is the page.

Two gloo ranks train a small model from the same weights on the same batches, with and without an
auxiliary loss. They use stock, FSEP, and stock once more with different rounding, the yardstick for
FSEP's deviation. Times are those of two CPU processes and do not show the speed of FSEP.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.command_line import (
    MOST_STEPS,
    add_json,
    parser_of,
    program,
)
from benchmarks.convergence_results import checks, gap_rows, rows
from benchmarks.convergence_runs import (
    AUX_LOSSES,
    MODEL,
    POINTS,
    RANKS,
    WAYS,
    Run,
    Text,
    command_line,
    measure,
)
from benchmarks.report import machine, print_table
from megatron_laer.cpu.ranks import RankPool
from megatron_laer.files.checks import quoted
from megatron_laer.files.writing import write_file
from megatron_laer.tools.cli.argument_types import between

# Limit per step, for a time-out; a step takes far less even on a busy machine.
_MOST_STEP_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Train missing runs and print the tables; return 1 if a check fails."""
    parser = parser_of("benchmarks.convergence", __doc__)
    parser.add_argument("--steps", type=_steps, default=2000, help="of each run")
    add_json(
        parser,
        "where to write the runs after each of them; those that it has are not run again",
    )
    options = parser.parse_args(arguments)
    runs = read(options.json, options.steps)
    _train(runs, options.steps, options.json)
    found = list(checks(runs))
    print(json.dumps(machine()))
    print_table(rows(runs))
    print_table(gap_rows(runs))
    for check in found:
        print(f"{'holds' if check.holds else 'MISSED':7} {check.sentence}")
    return 0 if all(check.holds for check in found) else 1


def _steps(text: str) -> int:
    steps = between(1, MOST_STEPS)(text)
    if steps % POINTS:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is no number of steps; give a multiple of {POINTS} up to "
            f"{MOST_STEPS}, as a model is validated {POINTS} times"
        )
    return steps


def _settings(steps: int) -> dict[str, Any]:
    return {"steps": steps, "ranks": RANKS, "model": MODEL.split()}


def read(path: Path | None, steps: int) -> dict[tuple[str, str], Run]:
    """Return the runs in a file, by way and auxiliary loss.

    Raises ValueError for a file of another command or with other settings.
    """
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != _settings(steps):
            raise ValueError(f"--json {quoted(path)} has runs with other settings; name another")
        return {(run.pop("way"), run.pop("aux")): Run(**run) for run in content["runs"]}
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--json {quoted(path)} is no file of this command; name another"
        ) from error


def _write(path: Path, runs: dict[tuple[str, str], Run], steps: int) -> None:
    content = {
        "machine": machine(),
        "settings": _settings(steps),
        "runs": [{"way": way, "aux": aux} | asdict(run) for (way, aux), run in runs.items()],
    }
    write_file(path, json.dumps(content) + "\n")


def _train(runs: dict[tuple[str, str], Run], steps: int, path: Path | None) -> None:
    missing = [(way, aux) for way in WAYS for aux in AUX_LOSSES if (way, aux) not in runs]
    with tempfile.TemporaryDirectory() as folder, RankPool(RANKS) as pool:
        text = Text.prepare(Path(folder)) if missing else None
        for way, aux in missing:
            assert text is not None
            flags = command_line(way, aux, steps, text)
            runs[way, aux] = pool.run(
                measure, flags, steps, timeout_s=600.0 + _MOST_STEP_S * steps
            )[0]
            print(f"{way}, aux loss {aux}: {runs[way, aux].wall_s / 60:.1f} minutes", flush=True)
            if path is not None:
                _write(path, runs, steps)


if __name__ == "__main__":
    program("python -m benchmarks.convergence", main)
