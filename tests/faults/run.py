"""A rank of a job that `jobs.py` starts: `torchrun ... -m tests.faults.run SPEC.json`.

SPEC has the flags of the run, a folder for the ranks' files, and a fault with its step and rank:

    kill           the rank is killed, at the job's first start; `started.json` has the ids of all
                   processes that it had started
    layout         the rank holds another layout than the others under the same version
    signal ranks   the rank sends `signal` to all processes of the job but the launcher
    signal job     and to the launcher

Each rank writes a line per step into `rank-R.jsonl`, and Megatron's exit status, if it exits before
the last step, into `rank-R.status`.
"""

from __future__ import annotations

from megatron_laer.launch import prepare

prepare()

# ruff: noqa: E402 -- imports of torch have to follow prepare()
import contextlib
import functools
import json
import os
import signal
import sys
from pathlib import Path

import psutil
import torch

from megatron_laer.cpu.training import train
from tests.faults.delays import digest
from tests.faults.injected import act_in_step, current_step, other_layout


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    fault, folder = spec["fault"], Path(spec["folder"])
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

    corrupt = other_layout(spec["rank"], spec["step"], ahead=False)

    def tell(model: list[torch.nn.Module]) -> None:
        line = {"attempt": attempt, "step": current_step(), "digest": digest(model)}
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if fault == "layout" and attempt == 0:
            corrupt(model)

    act = None
    if fault == "kill" and attempt == 0:
        act = functools.partial(kill, folder)
    elif fault.startswith("signal"):
        number = signal.Signals[spec["signal"]]
        act = functools.partial(stop, number, with_launcher=fault == "signal job")
    with contextlib.ExitStack() as stack:
        if act is not None:
            stack.enter_context(act_in_step(spec["step"], spec["rank"], act))
        try:
            train(spec["flags"], tell)
        except SystemExit as end:
            (folder / f"rank-{rank}.status").write_text(str(end.code))
            raise


def kill(folder: Path) -> None:
    """Kill this rank as the kernel does when a machine runs out of memory."""
    started = [process.pid for process in psutil.Process().children(recursive=True)]
    (folder / "started.json").write_text(json.dumps(started))
    os.kill(os.getpid(), signal.SIGKILL)


def stop(number: int, with_launcher: bool) -> None:
    """Signal every process of the job, as Slurm does; without its launcher, as torchrun does."""
    launcher = psutil.Process().parent()
    assert launcher is not None
    # This process last: the rest of its loop would not run.
    others = [
        process for process in launcher.children(recursive=True) if process.pid != os.getpid()
    ]
    for process in (*([launcher] if with_launcher else []), *others):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main(sys.argv[1])
