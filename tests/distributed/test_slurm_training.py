"""Training under a real Slurm: stopped, requeued and restarted jobs go on as if undisturbed.

Each job is compared with an undisturbed one, under `--fsep-late-plan wait`: all printed digits of
losses and gradient norms, and the layouts' versions. One loss is omitted: Megatron prints the mean
of two at the second step after a start. The script's own decisions are in test_slurm.py.

Each day a job on two nodes is saved, requeued and resumed. At night come ends that take a real
cluster and a real training; the paper's toys then train on this machine, without Slurm, by the same
script (`test_documented_commands.py`).
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_laer.telemetry import log
from tests import processes
from tests.checkpoints import saved_iteration
from tests.distributed.test_slurm import SBATCH, SCRIPT, TWO_NODES
from tests.slurm import Cluster, Job, kill_node, start_node

pytestmark = pytest.mark.slurm

_HELD = Path(__file__).resolve().parents[1] / "faults" / "held.py"
STEPS, SAVE_INTERVAL, HELD_IN = 12, 4, 7
FLAGS = [
    *f"--train-iters {STEPS} --save-interval {SAVE_INTERVAL} --global-batch-size 4".split(),
    *"--num-layers 2 --seq-length 64 --max-position-embeddings 64 --num-workers 0".split(),
    *"--lr 1e-3 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.1".split(),
    *"--adam-beta2 0.95 --weight-decay 0.1 --use-distributed-optimizer".split(),
    *"--overlap-grad-reduce --overlap-param-gather --micro-batch-size 1 --log-interval 1".split(),
    *"--eval-iters 1 --eval-interval 1000 --split 90,10,0".split(),
    *"--expert-model-parallel-size 2 --expert-tensor-parallel-size 1".split(),
    *"--expert-parallel-mode fsep --fsep-late-plan wait".split(),
]


@dataclass(frozen=True)
class Training:
    """Submitter of jobs that train the same model, with checkpoints in `folder`.

    `flags` are the training script's.
    """

    cluster: Cluster
    folder: Path
    flags: Sequence[str]

    def submit(self, *options: str, words: str = "", held: bool = False, **variables: str) -> Job:
        """Submit a job with `options`; the ranks of a `held` job stop in step HELD_IN."""
        settings = {
            "PYTHON": sys.executable,
            "PYTHONPATH": processes.python_path(),
            "MEGATRON_LAER_DEVICE": "cpu",
        }
        if held:
            (self.folder / "held").mkdir(exist_ok=True)
            settings |= {"HELD_IN_STEP": str(HELD_IN), "HELD_FOLDER": str(self.folder / "held")}
        script = str(_HELD if held else SCRIPT)
        command = (*options, f"--chdir={self.folder}", str(SBATCH), script)
        return self.cluster.submit(
            *(*command, *self.flags, *words.split()), environment=settings | variables
        )

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def submit_held(self, words: str = "", **variables: str) -> Job:
        job = self.submit(
            *TWO_NODES, words=words, held=True, CHECKPOINT=str(self.checkpoint), **variables
        )
        job.wait_for_text("is held, process", 2)
        return job


Make = Callable[[Path], Training]


@pytest.fixture(scope="module")
def make(slurm_cluster: Cluster, text_data: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    model = processes.python("-m", "megatron_laer", "flags", "tiny-moe", "--cpu").split()
    # All tests share the dataset and its index.
    data = ["--data-path", text_data, "--data-cache-path", str(tmp_path_factory.mktemp("cache"))]
    return lambda folder: Training(slurm_cluster, folder, [*model, *FLAGS, *data])


@pytest.fixture
def training(make: Make, tmp_path: Path) -> Iterator[Training]:
    training = make(tmp_path)
    yield training
    training.cluster.cancel_jobs()


@pytest.fixture(scope="module")
def undisturbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Job:
    training = make(tmp_path_factory.mktemp("undisturbed"))
    job = training.submit(*TWO_NODES, LOG_DIR=str(training.folder / "logs"))
    assert job.end() == "COMPLETED", job.log[-6000:]
    return job


def steps_of(job: Job) -> dict[int, log.Step]:
    return log.read_run("", job.log.splitlines()).steps


def assert_same(job: Job, undisturbed: Job, resumed_at: int, first: int = 1) -> None:
    """Compare a job's steps from `first` on; `resumed_at` is the checkpoint's step."""
    assert job.end() == "COMPLETED", job.log[-6000:]
    found, expected = steps_of(job), steps_of(undisturbed)
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert sorted(found) == list(range(first, STEPS + 1))
    for number, step in found.items():
        other = expected[number].values
        if number != resumed_at + 2:
            assert step.values[log.LOSS] == other[log.LOSS], number
        for name in ("grad norm", "fsep_layout_version"):
            assert step.values[name] == other[name], (number, name)


def test_the_jobs_log_names_node_and_rank(undisturbed: Job) -> None:
    for rank, node in enumerate(undisturbed.cluster.nodes):
        assert f"[{node} rank {rank}]: " in undisturbed.log
        assert f"[{node} rank {1 - rank}]: " not in undisturbed.log


def test_usr1_saves_and_the_requeued_job_goes_on_from_the_step_it_came_in(
    training: Training, undisturbed: Job
) -> None:
    job = training.submit_held("--num-workers 2")
    job.signal("USR1")
    job.wait_for_text(f"is at step {HELD_IN} of {STEPS}")
    assert saved_iteration(training.checkpoint) == HELD_IN
    job.wait_for_text("requeued (1 of 100)")
    job.restart_now()
    assert_same(job, undisturbed, HELD_IN)


@pytest.mark.nightly
def test_term_saves_where_megatron_is_told_so_and_the_next_job_goes_on(
    training: Training, undisturbed: Job
) -> None:
    job = training.submit_held("--num-workers 2 --exit-signal SIGTERM")
    job.signal("TERM")
    assert job.end() == "FAILED"  # torchrun's status after a signal
    assert saved_iteration(training.checkpoint) == HELD_IN
    following = training.submit(*TWO_NODES, CHECKPOINT=str(training.checkpoint))
    assert_same(following, undisturbed, HELD_IN, first=HELD_IN + 1)
    assert f"holds step {HELD_IN} of job {job.name} " in following.log


@pytest.mark.nightly
@pytest.mark.parametrize("silently", [True, False], ids=["Slurm sees it", "ranks see it"])
def test_a_job_that_loses_a_node_goes_on_when_it_is_back(
    training: Training, undisturbed: Job, silently: bool
) -> None:
    job = training.submit_held()
    lost = training.cluster.nodes[1]
    kill_node(training.cluster, lost, silently)
    try:
        job.wait_until(lambda: job.field("JobState") == "PENDING", "requeued")
        assert ("not all nodes answer" in job.log) != silently
    finally:
        start_node(training.cluster, lost)
    job.restart_now()
    assert_same(job, undisturbed, SAVE_INTERVAL)
    assert job.field("Restarts") == "1"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("time_limit", "signalled", "margin"),
    # Slurm sends its signal up to a minute early.
    [("60", "USR1@300", "57"), ("5", "USR1@60", "0")],
    ids=["Megatron's clock", "Slurm's signal"],
)
def test_a_job_saves_before_its_time_limit_and_goes_on_in_another(
    training: Training, undisturbed: Job, time_limit: str, signalled: str, margin: str
) -> None:
    job = training.submit(
        *(*TWO_NODES, f"--time={time_limit}", f"--signal={signalled}"),
        held=True,
        CHECKPOINT=str(training.checkpoint),
        MARGIN_MIN=margin,
    )
    job.wait_for_text("requeued (1 of 100)")
    saved = saved_iteration(training.checkpoint)
    assert f"{training.checkpoint} is at step {saved} of {STEPS}" in job.log
    job.restart_now()
    assert_same(job, undisturbed, saved)


@pytest.mark.nightly
def test_a_preempted_job_saves_and_goes_on_after_the_urgent_one(
    training: Training, undisturbed: Job
) -> None:
    job = training.submit_held()
    urgent = training.cluster.submit(
        *TWO_NODES, "--partition=urgent", "--exclusive", "--wrap=sleep 5"
    )
    assert urgent.end() == "COMPLETED"
    assert saved_iteration(training.checkpoint) == HELD_IN
    job.restart_now()
    assert_same(job, undisturbed, HELD_IN)


@pytest.mark.nightly
def test_a_job_whose_step_alone_is_ended_is_requeued(training: Training, undisturbed: Job) -> None:
    job = training.submit_held()
    training.cluster.run("scancel", f"{job.name}.0")
    job.wait_for_text("requeued (1 of 100)")
    assert "the run ended with status 1" in job.log  # 137 or 143
    job.restart_now()
    assert_same(job, undisturbed, SAVE_INTERVAL)


@pytest.mark.nightly
def test_a_cancelled_job_leaves_no_process_and_is_not_requeued(training: Training) -> None:
    job = training.submit_held()
    started = job.processes()
    assert {*held_processes(job)} <= {process.pid for process in started}
    training.cluster.run("scancel", job.name)
    assert job.end() == "CANCELLED"
    assert job.field("Restarts") == "0"
    assert psutil.wait_procs(started, timeout=60.0)[1] == []


@pytest.mark.nightly
@pytest.mark.parametrize("restarts", [1, 0])
def test_a_killed_rank_is_started_again_in_its_job_or_not_at_all(
    training: Training, undisturbed: Job, restarts: int
) -> None:
    job = training.submit_held(MAX_RESTARTS=str(restarts))
    started = job.processes()
    os.kill(held_processes(job)[1], signal.SIGKILL)
    if restarts:
        assert_same(job, undisturbed, SAVE_INTERVAL)
        assert "it is started again (1 of 1)" in job.log
    else:
        assert job.end() == "FAILED"
        assert "it is started again" not in job.log
    assert "requeued" not in job.log and job.field("Restarts") == "0"
    assert psutil.wait_procs(started, timeout=60.0)[1] == []


@pytest.mark.nightly
def test_a_job_whose_torchrun_is_killed_thrice_without_a_save_fails_and_the_same_command_goes_on(
    training: Training, undisturbed: Job
) -> None:
    job, node = training.submit_held(), training.cluster.nodes[1]
    kills = [f"torchrun was killed after it had saved step {SAVE_INTERVAL}"]
    kills += [f"torchrun was killed, {number} of at most 2 times" for number in (1, 2)]
    for number, text in enumerate([*kills, ""], start=1):
        job.wait_until(lambda: len(job.launchers(node)) == 1, "started torchrun")
        job.launchers(node)[0].kill()  # as the kernel does where memory runs out
        if text:
            job.wait_for_text(f"requeued ({number} of 100)")
            assert text in job.log
            job.restart_now()
    assert job.end() == "FAILED"
    assert "torchrun was killed 3 times in a row: out of memory?" in job.log
    assert f"goes on from step {SAVE_INTERVAL}" in job.log
    # Without cgroups Slurm loses sight of its ranks, whose parent is gone.
    for process in job.processes():
        process.kill()
    following = training.submit(*TWO_NODES, CHECKPOINT=str(training.checkpoint))
    assert_same(following, undisturbed, SAVE_INTERVAL, first=SAVE_INTERVAL + 1)


def held_processes(job: Job) -> list[int]:
    """Return the held ranks' processes, rank 0 first."""
    found = re.findall(r"rank (\d) is held, process (\d+)", job.log)
    return [int(process) for _, process in sorted(found)]
