"""Tables of the GPU check from made-up measurements, and its refusals."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu import (
    __main__,
    gemms,
    headline,
    kernels,
    layer,
    overlap,
    priorities,
    sizes,
    workloads,
)
from benchmarks.gpu.timing import Times
from benchmarks.training_run import Measured
from megatron_laer import fsep_flags
from tests.gpu.test_training import RUNS
from tests.gpu.two_ranks import words_of
from tests.parity import launched, under_delay
from tests.parity.compare import Distance
from tests.parity.rows import ROWS
from tests.unit.shell_scripts import fake_python, shell

_ROOT = Path(__file__).resolve().parents[2]
_CHECK = _ROOT / "scripts" / "gpu_check.sh"
_SBATCH = _ROOT / "scripts" / "slurm" / "gpu_check.sbatch"
_TINY = sizes.TINY[0]


def times(median_ms: float) -> Times:
    return Times.of([median_ms / 2, median_ms, 3 * median_ms])


def test_kernels_back_ends_and_priorities_are_shares_of_a_reference() -> None:
    (row,) = kernels.rows([("sum", "tiny", 4_000_000, times(2.0))], copied_gb_per_s=8.0)
    assert row["GB/s"] == 2.0 and row["share of a copy"] == 0.25
    assert (row["least"], row["most"]) == (1.0, 6.0)
    found: list[gemms.Case] = [
        (_TINY, "even", "backward", {"loop": times(4.0), "torch": times(3.0)})
    ]
    loop, torch_ = gemms.rows(found, plain_tflops=1.0)
    assert (loop["of loop's time"], torch_["of loop's time"]) == (1.0, 0.75)
    # Two products of 64 rows with 3 · 32 · 48 weights, two operations each.
    assert loop["share of a plain product"] == pytest.approx(2 * 2 * 64 * 3 * 32 * 48 / 4.0 / 1e9)
    alone = {"copy": times(0.5), "chain": times(10.0)}
    (row,) = priorities.rows(alone, {-2: (times(1.0), times(11.0))})
    assert row["of the copy alone"] == 2.0 and row["of the chain alone"] == 1.1


def test_layers_are_beside_stock_over_all_turns() -> None:
    def turn(forward: float, peak: int) -> dict[str, Any]:
        of = {"experts": "x", "rows": 9, "peak_bytes": peak}
        return {"forward": [forward], "backward": [6.0], **of}

    turns = {"stock": [turn(1.0, 2**20), turn(3.0, 2**21)], "fsep": [turn(6.0, 2**20)]}
    stock, fsep = layer.rows({"tiny": turns})
    assert stock["of stock's time"] == 1.0 and stock["peak MiB"] == 2.0
    assert fsep["of stock's time"] == 12.0 / 8.0
    (alone,) = layer.rows({"tiny": {"fsep": [turn(6.0, 0)]}})
    assert alone["of stock's time"] == ""


def test_the_share_of_forced_balance_counts_bursts_and_no_warm_up() -> None:
    forced = Measured(step_ms=[99.0, 8.0, 8.0], stock_skew=[1.0] * 3)
    mine = Measured(
        step_ms=[99.0, 4.0, 16.0],
        stock_skew=[9.0, 1.0, 2.0],
        restore_exposed_ms=[9.0, 1.0, 3.0],
        reduce_exposed_ms=[9.0, 0.0, 1.0],
    )
    fsep, stock = workloads.rows(
        [
            workloads.Case("W7", "fsep", 4096, mine, (forced, forced)),
            workloads.Case("W7", "stock", 4096, forced, (forced,)),
        ],
        warm_up=1,
    )
    assert fsep["share of forced balance"] == 0.8 and stock["share of forced balance"] == 1.0
    assert (fsep["restore exposed ms"], fsep["reduce exposed ms"]) == (2.0, 0.5)
    assert stock["restore exposed ms"] == "" and fsep["stock max/mean"] == 1.5


def test_parity_beyond_its_floor_differs() -> None:
    floor, far = Distance(1e-7, 1e-7, 1e-7, 1e-7), Distance(1e-3, 0.0, 0.0, 0.0)
    same, differs = (launched.judged(ROWS[0], found, floor) for found in (floor, far))
    assert (same["result"], differs["result"]) == ("equal", "DIFFERS")


def test_runs_on_a_card_have_flags_that_go_together() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    fsep_flags.add_arguments(parser)
    for flags in {flags for run in RUNS for flags in (run.like, run.own)}:
        args, _ = parser.parse_known_args(words_of(flags.split()))
        config = fsep_flags.config_from_args(args)  # raises if they do not
        assert (config is None) == ("standard" in flags)


def test_streams_are_held_up_by_a_card_alone() -> None:
    """A clock that is asked for needs nvidia-ml-py, which torch does not bring."""
    with mock.patch.object(torch.cuda, "_sleep") as sleep:
        under_delay._sleep(dry=True)()
        sleep.assert_not_called()
        under_delay._sleep(dry=False)()
        sleep.assert_called_once()


def test_every_part_has_tasks_and_ranks_are_asked_for() -> None:
    alone = __main__.tasks(__main__.PARTS, 1, 1, dry=False)
    assert [task.name for task in alone] == "tests kernels gemms priorities layer".split()
    on_eight = __main__.tasks(__main__.PARTS, 8, 1, dry=False)
    assert {task.name for task in on_eight} == set(__main__.PARTS)
    for nodes, expected in ((1, [2, 4, 8]), (4, [4, 8])):
        parity = __main__.tasks(["parity"], 8 * nodes, nodes, dry=False)
        assert [task.ranks for task in parity] == expected


FIRST = """
import json, sys
from pathlib import Path
json_file = Path(sys.argv[sys.argv.index("--json") + 1])
part = {"tables": {"One MoE layer beside stock's": [{"side": "fsep", "of stock's time": 1.5}]}}
json_file.write_text(json.dumps(part))
"""
ENDS = {
    "fails": "sys.exit('it broke')",
    "hangs": """
import subprocess, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
json_file.with_name("child").write_text(str(child.pid))
time.sleep(600)
""",
}


def test_a_part_that_hangs_or_fails_is_a_failure_and_its_results_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "out" / "child"

    class Popen(subprocess.Popen[Any]):
        """Process whose time is over as soon as it has a child."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and "hangs" in self.args:
                while not marker.exists() or not marker.read_text():
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    for name, end in ENDS.items():
        (tmp_path / f"{name}.py").write_text(FIRST + end)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(subprocess, "Popen", Popen)
    parts = zip(("gemms", "layer"), ENDS, strict=True)
    made = tuple(__main__.Task(name, module, 1) for name, module in parts)
    monkeypatch.setattr(__main__, "_TASKS", made)
    # Without the labelled device, which takes seconds to load.
    monkeypatch.setattr(__main__, "launch", lambda task, _: [sys.executable, "-m", task.module])
    words = ["--dry-run", "--parts", "gemms,layer", "--output", str(tmp_path / "out")]
    assert __main__.main(words) == 1
    printed = capsys.readouterr().out
    assert "FAILED: gemms, layer" in printed and "it broke" in printed
    assert "PROBLEM: gemms failed with status 1" in printed
    assert "PROBLEM: layer was ended after 720 s" in printed
    assert "FSEP's layer, of stock's time: 1.5" in printed
    written = json.loads((tmp_path / "out" / "result.json").read_text())["parts"]
    assert all(part["tables"] for part in written.values())
    with contextlib.suppress(ProcessLookupError):
        # Readable once the killed orphan has ended, which may be a moment later.
        assert select.select([os.pidfd_open(int(marker.read_text()))], [], [], 60)[0]


def test_products_and_an_exchange_are_compared_with_each_alone() -> None:
    alone = {"products alone": 4.0, "exchange alone": 8.0}
    (row,) = overlap.rows(
        [
            alone | {"products during the exchange": 6.0, "both": 9.0},
            alone | {"products during the exchange": 5.0, "both": 10.0},
        ]
    )
    assert row["products' slowdown"] == 1.5 and row["both, of the longer one"] == 1.25
    first, *_, last = headline.headline({"overlap": {"tables": {overlap.TITLE: [row]}}})
    assert first == ("slowdown of products during an exchange", "1.5")
    assert last == ("tests that need a card", "not measured")
    assert len(headline.FIGURES) == 10


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "torch sees no card; run this on a machine with one, or give --dry-run"),
        ("--parts parity", "--parts parity needs several ranks; give --ranks N as well"),
        ("--dry-run --ranks 3 --nodes 2", "--ranks 3 are not equally many on each of 2 nodes"),
        ("--dry-run --ranks 4 --nodes 2", "needs --address; submit scripts/slurm/gpu_check"),
        ("--ranks 8", "--ranks 8 needs 8 cards on a node, and this one has 4"),
    ],
)
def test_what_cannot_run_is_refused(
    words: str, problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "--ranks 8" in words)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert __main__.main(words.split()) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "body", "problem"),
    [
        (["--wheels"], "exit 0", "--wheels needs a folder"),
        (["--wheels", "."], "exit 0", "--wheels . holds no wheel of megatron-core; fill it"),
        ([], 'case "$2" in *version*) exit 1 ;; esac; echo old', "old; 3.12 or newer is needed"),
        ([], 'case "$2" in *torch*) exit 1 ;; esac', "has no torch; set PYTHON to the one that"),
        (
            [],
            'case "$2" in *numpy*) exit 1 ;; esac',
            "has no numpy, which torch does not bring; give",
        ),
        ([], 'case "$2" in *megatron*) exit 1 ;; esac', "or the native core is not built; give"),
    ],
)
def test_a_python_that_lacks_something_is_refused(
    tmp_path: Path, words: list[str], body: str, problem: str
) -> None:
    result = shell(_CHECK, *words, PYTHON=str(fake_python(tmp_path, "python", body)))
    assert result.returncode == 2
    assert problem in result.stderr and "gpu_check: " in result.stderr


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    shown = f'echo "   Command={_SBATCH} --wheels w"'
    fake_python(tmp_path, "scontrol", f'[ "$2" = job ] && {shown} || printf "n7\\nn8\\n"')
    return {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_GPUS_PER_NODE": "h100:8",
        "DRY_RUN": "1",
    }


def test_a_job_runs_the_check_on_all_cards_of_its_nodes_and_several_nodes_get_a_launcher_each(
    tmp_path: Path, job: dict[str, str]
) -> None:
    copied = tmp_path / "slurm_script"
    shutil.copy(_SBATCH, copied)
    for script in (_SBATCH, copied):
        result = shell(script, "--wheels", "w", **job)
        words = shlex.split(result.stdout)
        assert words[0] == "bash" and Path(words[1]).resolve() == _CHECK, result.stderr
        expected = f"--ranks 16 --nodes 2 --address n7 --port {20000 + 123456 * 8 % 12000}"
        assert words[2:] == [*expected.split(), "--wheels", "w"]
    options = argparse.Namespace(nodes=2, address="n7", port=20008, dry_run=False)
    words = __main__.launch(__main__.Task("x", "m", 1, ranks=8), options)
    assert words[:5] == ["srun", "--nodes", "2", "--ntasks", "2"]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[words.index("--master-addr") + 1] == "n7"
    assert words[-2:] == ["-m", "m"]


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"SLURM_JOB_ID": ""}, "this is no Slurm job; submit it with sbatch"),
        ({"SLURM_GPUS_PER_NODE": ""}, "SLURM_GPUS_ON_NODE= is no number of GPUs per node"),
        ({"SLURM_JOB_NUM_NODES": "many"}, "SLURM_JOB_NUM_NODES=many is no whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no whole number in 1024..65535"),
    ],
)
def test_a_job_that_lacks_something_is_refused(
    job: dict[str, str], environment: dict[str, str], problem: str
) -> None:
    result = shell(_SBATCH, **{**job, **environment})
    assert result.returncode == 2 and problem in result.stderr
