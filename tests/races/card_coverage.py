"""Lines that only a card runs, before and after the labelled device: a table.

`python -m tests.races.card_coverage` runs each case in a process of its own, with a limit. It
prints the lines by file, and those that no case runs. Its status is 1 if these are many.
`fake_cuda/lines.py` says which lines only a card runs.

Before the device are unit tests, with fakes, and layers and Megatron's loop on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPool
from tests.fake_cuda import layer
from tests.fake_cuda.lines import ROOT, Line, only_on_card, recorded
from tests.parity.replay import train_row
from tests.races import training
from tests.text_data import write_text_data

# A product that torch's CPU lacks, and calibration on a card with a single queue.
MOST_LEFT = 4
LIMIT_S, CASE_LIMIT_S = 300.0, 900.0  # of a run and of a case
# Of code that no run reaches without the machines or packages that it is about.
_TESTS = (
    *("unit/test_exchange_launches.py", "unit/test_fp8_back_end.py", "unit/test_launcher.py"),
    *("unit/test_nccl_options.py", "unit/test_slot_gemm.py", "unit/test_steps.py"),
    "unit/test_streams.py",
    "tools/test_configurations.py::test_a_card_has_the_constants_of_its_kind",
)


class Case(NamedTuple):
    """Runs of some ranks, one after another; each returns every rank's lines.

    Attributes:
        column: of the table, in `COLUMNS`.
        run: of each of the arguments and a folder with a text.
    """

    column: str
    run: Callable[..., list[Line]]
    arguments: tuple[tuple[Any, ...], ...]
    ranks: int = 2


def train_layer(name: str, folder: str) -> list[Line]:
    return recorded(lambda: layer.train(name))


def watch_layer(name: str, one_queue: bool, folder: str) -> list[Line]:
    return recorded(lambda: layer.watch(name, one_queue))


def train_loop(scenario: str, folder: str) -> list[Line]:
    return recorded(lambda: train_row(_command(scenario, folder)))


def watch_loop(scenario: str, folder: str) -> list[Line]:
    """Train a scenario on the labelled device, with records of metrics."""
    command = _command(scenario, folder)
    with mock.patch.object(training, "command_of", lambda *_: command):
        return recorded(lambda: training.watch(folder, scenario, None))


def _command(scenario: str, folder: str) -> list[str]:
    data = f"{folder}/text"
    records = ["--fsep-record", f"{folder}/metrics", "metrics"]
    return [*training.command_of(data, scenario), *records]


def unit_tests(folder: str) -> list[Line]:
    words = ["-q", "-m", "not nightly and not gpu", "-p", "no:cacheprovider"]
    words += [str(ROOT / "tests" / name) for name in _TESTS]

    def run() -> None:
        assert pytest.main(words) == pytest.ExitCode.OK

    return recorded(run)


COLUMNS = UNITS, CPU, DEVICE = "units", "CPU", "device"
CASES = {
    "unit tests": Case(UNITS, unit_tests, ((),), 1),
    "CPU, layers": Case(CPU, train_layer, tuple((name,) for name in layer.CASES)),
    "CPU, loop": Case(CPU, train_loop, (("kernels, by nodes of 1",),)),
    # In turn for a card with many hardware queues and for one with a single queue.
    "layers": Case(DEVICE, watch_layer, tuple(zip(layer.CASES, cycle((False, True))))),
    **{
        scenario: Case(DEVICE, watch_loop, ((scenario,),))
        for scenario in (
            "kernels, by nodes of 1",
            "full recompute",
            "HybridEP, grouped GEMMs in bf16",
            "one queue, experts at home by relay, full recompute",
            "combined 1F1B, shared experts",
        )
    },
}


def main(words: list[str]) -> int:
    """Print the table, and what is left; return 1 if it is much.

    `words` are none, or the name of a single case and a file for its lines.
    """
    if words:
        return _run_case(*words)
    return report(_lines_run())


def report(lines: dict[str, set[Line]]) -> int:
    """Do as `main` does, with the lines that ran by column."""
    statements, left = only_on_card(), []
    counts = {file: Counter[str]() for file in ("in all", *(one.file for one in statements))}
    for one in statements:
        ran = {column: one.was_run(lines[column]) for column in COLUMNS}
        for file in ("in all", one.file):
            counts[file].update(lines=1, left=not any(ran.values()), **ran)
        if not any(ran.values()):
            left.append(one)
    columns = "lines", *COLUMNS, "left"
    print(f"{'lines that only a card runs':50}", *(f"{column:>7}" for column in columns))
    for file, count in counts.items():
        print(f"{file:50}", *(f"{count[column]:>7}" for column in columns))
    for one in left:
        print(f"{one.file}:{one.first} {one.text}")
    return int(len(left) > MOST_LEFT)


def _lines_run() -> dict[str, set[Line]]:
    """Run all cases; return their lines by column."""
    lines: dict[str, set[Line]] = {column: set() for column in COLUMNS}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            print(name, file=sys.stderr, flush=True)
            file = Path(folder) / "lines.json"
            words = [sys.executable, "-m", "tests.races.card_coverage", name, str(file)]
            subprocess.run(words, cwd=ROOT, check=True, timeout=CASE_LIMIT_S)
            lines[case.column] |= {(path, line) for path, line in json.loads(file.read_text())}
    return lines


def _run_case(name: str, file: str) -> int:
    """Write the union of the ranks' lines."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder, RankPool(case.ranks) as pool:
        write_text_data(f"{folder}/text")
        # A call each, since a rank's second process group needs a store of its own.
        parts = [
            part
            for arguments in case.arguments
            for part in pool.run(case.run, *arguments, folder, timeout_s=LIMIT_S)
        ]
    Path(file).write_text(json.dumps(sorted({line for part in parts for line in part})))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
