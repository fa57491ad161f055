"""A job that is restarted until its last step, as by torchrun and Slurm, amid faults.

If a rank fails, the others are asked to end and then killed. `checks` judges the outcome.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_laer.cpu import ranks
from megatron_laer.runtime.planning.planner_checkpoint import FOLDER
from tests.chaos import rank
from tests.chaos.plans import SWITCH_EVERY, Fault, Plan
from tests.checkpoints import iteration_folder
from tests.records import FORMATS, taken_apart

# Limit of one start, an order of magnitude above need.
_HANG_S = 900.0
# As torchrun waits, on a busy machine.
_TERM_S = 60.0
_POLL_S = 0.02
# Interval of looks at all processes of the machine.
_LOOK_S = 0.5
# A stopped rank goes on after that.
_STOPPED_S = 2.0


@dataclass
class Outcome:
    """Result of a run: its starts' ends, all processes seen, and the reason to give up, or "".

    `expected` are words of which a start with this number, or a later one, has to log.
    """

    folder: Path
    starts: list[str] = field(default_factory=list)
    expected: list[tuple[int, str]] = field(default_factory=list)
    problem: str = ""
    started: set[psutil.Process] = field(default_factory=set)


def run_job(plan: Plan, data: str, folder: Path) -> Outcome:
    """Start a job until it ends."""
    folder.mkdir(parents=True)
    outcome, faults = Outcome(folder), list(plan.faults)
    lost = set[Path]()
    for start in range(len(faults) + len(plan.variant.later) + 2):
        step, waiting = saved_step(folder), [*faults]
        if plan.variant.loses_state and step and step % SWITCH_EVERY == 0:
            for path in {*(iteration_folder(folder / "saved", step) / FOLDER).iterdir()} - lost:
                lost.add(path)
                _lose(path, plan)
                said = f"planning starts anew, from the static layout: {path}: "
                outcome.expected += [(start, said)] if plan.faults else []
        codes = _start(plan, data, outcome, start, faults)
        made = steps_made(folder)
        outcome.starts.append(f"{made[-1] + 1 if made else 0}:{','.join(map(str, codes))}")
        if not any(codes) and made and made[-1] == plan.steps - 1:
            return outcome
        if outcome.problem:
            return outcome
        if len(faults) < len(waiting) and _tear(plan, folder, waiting[-len(faults) - 1].torn_bytes):
            outcome.expected.append((start + 1, "are no whole record"))
    outcome.problem = f"not ended after {len(outcome.starts)} starts"
    return outcome


def steps_made(folder: Path) -> list[int]:
    """Return the steps that rank 0 has ended, in order, repeated ones included."""
    path = folder / "rank-0.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def saved_step(folder: Path) -> int:
    tracker = folder / "saved" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text() or 0) if tracker.exists() else 0


def _lose(path: Path, plan: Plan) -> None:
    """Flip a bit of a planner's state; in an undisturbed run it is missing, which has to equal."""
    if not plan.faults:
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    draws = random.Random(repr(plan))
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


def _tear(plan: Plan, folder: Path, torn_bytes: int) -> bool:
    """Damage the ends of recordings that the next start resumes, as a loss of power does."""
    step, torn = saved_step(folder), False
    for path in (folder / plan.recorded(step)).glob("group-0.*") if step and torn_bytes else ():
        is_recording = path.suffix[1:] in FORMATS and ".cut-from" not in path.name
        if not is_recording or b"\n" not in path.read_bytes():
            continue
        _, content = taken_apart(path)
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            is_needed = not content or content[-1][1] < step
            file.truncate(end + torn_bytes if is_needed else end - torn_bytes)
        torn = True
    return torn


def _start(plan: Plan, data: str, outcome: Outcome, start: int, faults: list[Fault]) -> list[int]:
    """Start the ranks once; faults that came are taken out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([ranks.preparation])
    # Served here, as by torchrun: a port found free may be taken when the ranks start.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    step = saved_step(outcome.folder)
    _, size = plan.variant.life(step)
    environment = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONWARNINGS": "ignore",
    }
    processes = []
    folder = str(outcome.folder)
    flags = plan.flags(data, folder, step)
    for number in range(size):
        own = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
        log = f"{folder}/start-{start}-rank-{number}.log"
        last_step = faults[0].awaited_by(number) if faults else None
        process = context.Process(
            target=rank.run, args=(number, flags, folder, log, own, last_step)
        )
        process.start()
        processes.append(process)
    try:
        _supervise(processes, outcome, faults)
    finally:
        # Only ranks that still run: their children have to end by themselves.
        _signal(processes, signal.SIGKILL)
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _supervise(
    processes: Sequence[ForkServerProcess], outcome: Outcome, faults: list[Fault]
) -> None:
    began_s = time.monotonic()
    fault = faults[0] if faults else None
    already = len(steps_made(outcome.folder))
    due_s, term_s, looked_s = None, None, 0.0
    while any(process.exitcode is None for process in processes):
        now_s = time.monotonic()
        if now_s - looked_s > _LOOK_S:
            looked_s = now_s
            outcome.started |= _descendants(processes)
        if now_s - began_s > _HANG_S:
            outcome.problem = f"a start had not ended after {_HANG_S:.0f} s"
            return
        if fault is not None:
            made = steps_made(outcome.folder)
            is_at_step = not fault.step or (made[already:] and made[-1] + 1 >= fault.step)
            is_due = is_at_step and (fault.kind != "KILL saving" or _saves(outcome.folder))
            if due_s is None and is_due:
                due_s = now_s + fault.delay_s
            if due_s is not None and now_s >= due_s:
                outcome.started |= _descendants(processes)
                _inject(processes, fault)
                del faults[0]
                goes_on = fault.kind == "STOP one" and faults
                fault, due_s = faults[0] if goes_on else None, None
        failed = any(process.exitcode for process in processes)
        if failed and term_s is None:
            term_s = now_s + _TERM_S
            _signal(processes, signal.SIGTERM)
        if term_s is not None and now_s > term_s:
            return
        time.sleep(_POLL_S)


def _saves(folder: Path) -> bool:
    """Return True while a checkpoint is written that does not count yet."""
    written = [int(path.name.removeprefix("iter_")) for path in folder.glob("saved/iter_*")]
    return bool(written) and max(written) > saved_step(folder)


def _inject(processes: Sequence[ForkServerProcess], fault: Fault) -> None:
    name, who = fault.kind.split()
    number = signal.Signals[f"SIG{name}"]
    # A run that changes its size may have fewer ranks by now.
    chosen = [processes[fault.rank % len(processes)]] if who == "one" else processes
    if fault.kind in ("TERM all", "USR1 all"):
        _signal(processes, number)  # with all their processes, as Slurm and torchrun do
        return
    numbers = [number, signal.SIGCONT] if name == "STOP" else [number]
    for number in numbers:
        for process in chosen:
            # A rank may have ended just now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        if number == signal.SIGSTOP:
            time.sleep(_STOPPED_S)


def _signal(processes: Sequence[ForkServerProcess], number: int) -> None:
    for process in processes:
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
                continue
            # It does not lead its session yet, or has ended just now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _descendants(processes: Sequence[ForkServerProcess]) -> set[psutil.Process]:
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            found |= {own, *own.children(recursive=True)}
    return found
