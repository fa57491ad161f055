"""Jobs of real ranks under `torchrun`; `run.py` has the ranks' part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.processes import python_path


def run_job(
    folder: Path,
    flags: Sequence[str],
    *,
    fault: str = "none",
    step: int = 0,
    rank: int = 0,
    signal_name: str = "",
    ranks: int = 2,
    restarts: int = 0,
    ignored: str = "",
) -> int:
    """Run a job and end all its ranks; return `torchrun`'s status. The output is in `output`.

    `run.py` explains `fault`, `step`, `rank` and `signal_name`. The launcher ignores the signal
    named `ignored`.
    """
    folder.mkdir(exist_ok=True)
    spec: dict[str, Any] = {"flags": list(flags), "folder": str(folder), "fault": fault}
    spec |= {"step": step, "rank": rank, "signal": signal_name}
    (folder / "spec.json").write_text(json.dumps(spec))
    launcher = (
        f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --max-restarts {restarts}"
    ).split()
    command = [sys.executable, *launcher, "-m", "tests.faults.run", str(folder / "spec.json")]
    if ignored:
        command = ["bash", "-c", f"trap '' {ignored}; exec \"$@\"", "job", *command]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ
            | {
                "MEGATRON_LAER_DEVICE": "cpu",
                "PYTHONPATH": python_path(),
                "OMP_NUM_THREADS": "1",
                # Otherwise a restarted rank may find addresses of the previous attempt in the
                # shared store: github.com/pytorch/pytorch/issues/135712.
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                # A busy machine may need longer for a save than the 30 s that torchrun waits for.
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=600.0)
        finally:
            # Ranks lead sessions of their own. Normally torchrun has ended them.
            with contextlib.suppress(psutil.NoSuchProcess):
                for descendant in psutil.Process(process.pid).children(recursive=True):
                    descendant.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output_of(folder: Path) -> str:
    return (folder / "output").read_text(errors="replace")


def steps_of(folder: Path, rank: int) -> list[dict[str, Any]]:
    lines = (folder / f"rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
