"""Jobs that a launcher stops: every rank saves and ends with 0, and no child outlives its rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.checkpoints import NEEDS_NVRX, saved_iteration
from tests.faults.delays import digest
from tests.faults.jobs import output_of, run_job, steps_of
from tests.parity.flags import command_line
from tests.processes import outlive

PLANNED = " --expert-parallel-mode fsep --fsep-planner greedy --fsep-late-plan wait"
ASYNC = " --async-save --use-persistent-ckpt-worker --async-strategy mcore"
NVRX = ASYNC.replace("mcore", "nvrx")
# Signal, loader workers and kind of save: every two of them at night. A day tries other values than
# test_faults.py, where a signal in a step comes without loader workers and saves at once.
DAILY_STOPS = [("SIGUSR1", 2, ASYNC)]
STOPS = [("SIGTERM", 0, ""), ("SIGUSR1", 2, ""), ("SIGTERM", 2, ASYNC), ("SIGUSR1", 0, ASYNC)]
NVRX_STOPS = [("SIGTERM", 2, NVRX), ("SIGUSR1", 0, NVRX)]
RESTORED = "FSEP: the planner's state is restored"


@pytest.fixture
def command(text_data: str) -> Callable[..., list[str]]:
    return partial(command_line, text_data, global_batch=8)


def stops_at(signal_name: str, folder: Path, workers: int = 0, save: str = "") -> str:
    """Return flags of a run that saves and ends at a signal, and resumes from the folder."""
    return (
        f"{PLANNED} --save {folder} --load {folder} --save-interval 2 --exit-signal-handler"
        f" --exit-signal {signal_name} --num-workers {workers}{save}"
    )


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param(DAILY_STOPS, marks=pytest.mark.counts(fault_runs=1, resumed_runs=1)),
        pytest.param(
            STOPS, marks=[pytest.mark.nightly, pytest.mark.counts(fault_runs=4, resumed_runs=4)]
        ),
        pytest.param(
            NVRX_STOPS, marks=[NEEDS_NVRX, pytest.mark.counts(fault_runs=2, resumed_runs=2)]
        ),
    ],
    ids=["one stop", "four stops", "nvidia-resiliency-ext"],
)
def test_a_job_stopped_over_and_over_ends_bitwise_as_one_that_was_not(
    ranks: RankPools,
    command: Callable[..., list[str]],
    tmp_path: Path,
    stops: list[tuple[str, int, str]],
) -> None:
    # Every start makes three steps: a save after one or two starts its helpers, and the signal
    # comes in the third.
    steps = 3 * len(stops) + 2
    flags = partial(command, steps=steps)
    whole_flags = flags(extra=f"{PLANNED} --load {tmp_path / 'none'}")
    whole = [record.probes for record in ranks(2).run(train, whole_flags, digest)]
    found: list[list[str]] = [[], []]
    for start, (signal_name, workers, save) in enumerate([*stops, ("SIGTERM", 0, "")]):
        folder = tmp_path / f"start-{start}"
        extra = stops_at(signal_name, tmp_path / "checkpoints", workers, save)
        status = run_job(
            folder,
            flags(extra=extra),
            fault="signal ranks" if start < len(stops) else "none",
            step=3 * start + 2,
            signal_name=signal_name,
        )
        output = output_of(folder)
        assert status == 0, f"{signal_name}, {workers} workers, {save}: {output[-4000:]}"
        if start < len(stops):
            assert saved_iteration(tmp_path / "checkpoints") == 3 * start + 3
            assert [(folder / f"rank-{rank}.status").read_text() for rank in range(2)] == ["0"] * 2
        assert output.count(RESTORED) == (start > 0)
        assert (
            start == 0 or f"goes on with step {3 * start}, layout version {3 * start - 1}" in output
        )
        for rank in range(2):
            found[rank] += [step["digest"] for step in steps_of(folder, rank)]
    assert found == whole
    assert len(found[0]) == steps


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize(
    # The jobs of test_slurm_training.py are sent USR1 each day.
    "signal_name",
    ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.nightly)],
)
def test_a_signal_that_also_reaches_torchrun_finds_the_job_saved(
    command: Callable[..., list[str]], tmp_path: Path, signal_name: str
) -> None:
    flags = command(extra=stops_at(signal_name, tmp_path / "checkpoints"), steps=1000)
    status = run_job(
        tmp_path,
        flags,
        fault="signal job",
        step=4,
        signal_name=signal_name,
        # As the Slurm script starts it, since this signal would end torchrun.
        ignored="USR1" if signal_name == "SIGUSR1" else "",
    )
    # At SIGTERM, torchrun ends its ranks and fails, however well they ended.
    assert status == (1 if signal_name == "SIGTERM" else 0), output_of(tmp_path)[-4000:]
    assert saved_iteration(tmp_path / "checkpoints") == 5
    assert [(tmp_path / f"rank-{rank}.status").read_text() for rank in range(2)] == ["0"] * 2


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize(
    "save",
    # An asynchronous save starts what a synchronous run starts, and its writer.
    [pytest.param("", marks=pytest.mark.nightly), ASYNC, pytest.param(NVRX, marks=NEEDS_NVRX)],
    ids=["sync", "async", "nvidia-resiliency-ext"],
)
def test_whatever_a_killed_rank_had_started_ends(
    command: Callable[..., list[str]], tmp_path: Path, save: str
) -> None:
    extra = stops_at("SIGTERM", tmp_path / "checkpoints", 2, save)
    assert run_job(tmp_path, command(extra=extra, steps=8), fault="kill", step=4, rank=1) != 0
    started = json.loads((tmp_path / "started.json").read_text())
    # Loader workers, multiprocessing's tracker, the writer's manager, and its worker.
    assert len(started) >= 4 + bool(save)
    assert outlive(started) == []
