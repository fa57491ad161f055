"""scripts/slurm/pretrain.sbatch on a real Slurm: the programs it starts where, and its requeues.

Shell replaces torchrun on each node. Real training is in test_slurm_training.py.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests import processes
from tests.slurm import Cluster, Job

pytestmark = pytest.mark.slurm

_ROOT = Path(__file__).resolve().parents[2]
SBATCH = _ROOT / "scripts" / "slurm" / "pretrain.sbatch"
SCRIPT = _ROOT / "pretrain_gpt.py"
# Exclusive jobs hold all GPUs of a node: one is requested, and two are held.
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")
ONE_NODE = ("--nodes=1", "--gpus-per-node=2")
# Ten steps of ten have been saved.
SAVE_ALL = 'echo 10 >"$CHECKPOINT/latest_checkpointed_iteration.txt"'

Submit = Callable[..., Job]


def settings(folder: Path, body: str = "", **more: str) -> dict[str, str]:
    """Return a job's variables; `body` replaces torchrun."""
    python = folder / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ $* == *torch.distributed.run* ]] || exec {shlex.quote(sys.executable)} "$@"\n'
        # A separate file, since srun mixes long lines of two nodes in the job's log. Without the
        # text of torchrun's start.
        'printf "%s %s\\n" "$SLURMD_NODENAME" "${*:4}" >>"$0.started"\n'
        'echo "started: $SLURMD_NODENAME"\n'
        f"{body}\n"
    )
    python.chmod(0o755)
    return {"PYTHON": str(python), "PYTHONPATH": processes.python_path()} | more


@pytest.fixture
def submit(slurm_cluster: Cluster, tmp_path: Path) -> Submit:
    """Return `submit(options, body, **variables)`: a job of ten steps with a checkpoint folder."""

    def job(options: Sequence[str], body: str = "", **variables: str) -> Job:
        own = {"CHECKPOINT": str(tmp_path / "run")} | variables
        return slurm_cluster.submit(
            *(*options, str(SBATCH), str(SCRIPT), "--train-iters", "10"),
            environment=settings(tmp_path, body, **own),
        )

    return job


@pytest.fixture(autouse=True)
def no_job_is_left(slurm_cluster: Cluster) -> Iterator[None]:
    yield
    slurm_cluster.cancel_jobs()


def command_lines(folder: Path) -> str:
    return (folder / "python.started").read_text()


def started(folder: Path) -> dict[str, list[str]]:
    lines = map(shlex.split, command_lines(folder).splitlines())
    return {node: words for node, *words in lines}


def value_of(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.quick
def test_every_node_starts_its_ranks_in_the_order_of_slurm_and_meets_on_the_first(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    body = 'echo "connections: $CUDA_DEVICE_MAX_CONNECTIONS, $MINE"'
    variables = settings(tmp_path, body, MINE="7", LOG_DIR=str(tmp_path / "logs"))
    # By name, as where Slurm hides the environment.
    named = ",".join(f"{name}={value}" for name, value in variables.items())
    options = *TWO_NODES, "--cpus-per-task=2", f"--export={named}"
    job = slurm_cluster.submit(*options, str(SBATCH), str(SCRIPT), "--lr", "3e-4")
    assert job.end() == "COMPLETED", job.log
    assert job.log.count("connections: 32, 7") == 2
    found = started(tmp_path)
    assert sorted(found) == list(slurm_cluster.nodes)
    for number, node in enumerate(slurm_cluster.nodes):
        words = found[node]
        assert value_of("--node-rank", words) == str(number)
        assert value_of("--nnodes", words) == "2"
        assert value_of("--nproc-per-node", words) == "1"
        assert value_of("--master-addr", words) == slurm_cluster.nodes[0]
        assert value_of("--master-port", words) == str(20000 + int(job.name) * 8 % 12000)
        assert value_of("--log-dir", words) == str(tmp_path / "logs" / node)
        assert words[-3:] == [str(SCRIPT), "--lr", "3e-4"]


@pytest.mark.quick
def test_an_interactive_allocation_has_as_many_ranks_as_it_asked_gpus_for(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    printed = slurm_cluster.run(
        *("salloc", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2"),
        *("bash", str(SBATCH), str(SCRIPT)),
        environment=settings(tmp_path),
    )
    assert printed.count("started:") == 2, printed
    words_by_node = started(tmp_path)
    assert sorted(words_by_node) == list(slurm_cluster.nodes)
    assert {value_of("--nproc-per-node", words) for words in words_by_node.values()} == {"2"}


def test_without_a_checkpoint_a_job_is_not_requeued(slurm_cluster: Cluster, tmp_path: Path) -> None:
    environment = settings(tmp_path, "sleep 600")
    job = slurm_cluster.submit(*ONE_NODE, str(SBATCH), str(SCRIPT), environment=environment)
    job.wait_for_text("started:")
    assert "without CHECKPOINT a requeued job would begin at step 0" in job.log
    assert job.field("Requeue") == "0"
    with pytest.raises(RuntimeError, match="disabled"):
        slurm_cluster.run("scontrol", "requeue", job.name)


def test_a_job_that_is_told_to_end_is_not_started_again(
    slurm_cluster: Cluster, submit: Submit
) -> None:
    job = submit(TWO_NODES, "sleep 600", MAX_RESTARTS="9")
    job.wait_for_text("started:", 2)
    slurm_cluster.run("scancel", job.name)
    assert job.end() == "CANCELLED", job.log
    assert job.log.count("started:") == 2
    assert "it is started again" not in job.log


def test_a_job_is_requeued_with_its_log_while_steps_remain_and_no_more_often_than_allowed(
    submit: Submit, tmp_path: Path
) -> None:
    body = (
        'echo $((${SLURM_RESTART_COUNT:-0} + 1)) >"$CHECKPOINT/latest_checkpointed_iteration.txt"'
    )
    job = submit((*ONE_NODE, "--time=60"), body, MAX_REQUEUES="2", MARGIN_MIN="1")
    for count in (1, 2):
        job.wait_for_text(f"requeued ({count} of 2)")
        job.restart_now()
    assert job.end() == "COMPLETED", job.log
    assert job.log.count("started:") == 3
    assert f"{tmp_path}/run holds step 1 of this job, as it was before restart 1" in job.log
    assert "step 3 of 10" in job.log
    assert "not requeued: MAX_REQUEUES=2 is reached" in job.log
    minutes = [
        int(found)
        for found in re.findall(r"--exit-duration-in-mins (\d+)", command_lines(tmp_path))
    ]
    # The limit is an hour, and a minute or so has passed.
    assert len(minutes) == 3 and all(50 <= each < 60 for each in minutes)


def test_a_job_that_scontrol_requeues_goes_on_from_its_last_step(
    slurm_cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    body = f"""
        [[ ${{SLURM_RESTART_COUNT:-0}} == 0 ]] || {{ {SAVE_ALL}; exit; }}
        echo 4 >"$CHECKPOINT/latest_checkpointed_iteration.txt"
        echo waiting
        sleep 600"""
    job = submit(ONE_NODE, body)
    job.wait_for_text("waiting")
    slurm_cluster.run("scontrol", "requeue", job.name)
    job.restart_now()
    assert job.end() == "COMPLETED", job.log
    assert job.log.count("started:") == 2
    assert f"{tmp_path}/run holds step 4 of this job, as it was before restart 1" in job.log


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--time=10",), "--time leaves no minute next to MARGIN_MIN=15"),
        ((), "the run has saved no further step"),
    ],
)
def test_a_job_that_would_be_requeued_for_ever_fails(
    submit: Submit, options: tuple[str, ...], said: str
) -> None:
    job = submit((*ONE_NODE, *options), "true")
    assert job.end() == "FAILED"
    assert said in job.log


def test_a_run_that_fails_on_one_node_ends_on_both_and_is_started_again_as_often_as_allowed(
    submit: Submit, tmp_path: Path
) -> None:
    body = """
        port=$(sed "s/.*--master-port \\([0-9]*\\).*/\\1/" <<<"$*")
        [[ $SLURM_NODEID == 0 ]] && sleep 600
        # Not before both nodes have started, since srun then ends the other one.
        until (($(grep -c -- "--master-port $port " "$0.started") == 2)); do sleep 0.1; done
        exit 7"""
    job = submit(TWO_NODES, body, MAX_RESTARTS="1")
    assert job.end() == "FAILED", job.log
    assert job.log.count("it is started again (1 of 1)") == 1
    # srun's number may be the rank's, or that of the step's other node.
    assert "the run ended with status " in job.log and "requeued" not in job.log
    ports = re.findall(r"--master-port (\d+)", command_lines(tmp_path))
    assert len(ports) == 4 and len(set(ports)) == 2


def test_a_run_that_finds_wrong_weights_is_neither_started_again_nor_requeued(
    submit: Submit,
) -> None:
    body = "[[ $SLURM_NODEID == 0 ]] && sleep 600\nexit 86"
    job = submit(TWO_NODES, body, MAX_RESTARTS="3")
    assert job.end() == "FAILED", job.log
    assert job.field("ExitCode") == "86:0"
    assert "ranks found wrong weights, gradients or tokens" in job.log
    assert "it is started again" not in job.log and "requeued (" not in job.log


def test_usr1_to_the_batch_shell_reaches_what_handles_it_and_nothing_else_ends(
    submit: Submit,
) -> None:
    # A launcher that ignores the signal, as it must, and a rank that handles it. A shell cannot
    # handle a signal that it was started to ignore, but Python can.
    rank = (
        "import signal, time, sys; "
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0)); print('ready', flush=True); "
        "time.sleep(600)"
    )
    body = f"{shlex.quote(sys.executable)} -c {shlex.quote(rank)}\necho saved\n{SAVE_ALL}"
    job = submit(TWO_NODES, body)
    job.wait_for_text("ready", 2)
    job.signal("USR1", "--batch")
    assert job.end() == "COMPLETED", job.log
    assert job.log.count("saved") == 2


def test_a_checkpoint_in_use_is_refused_and_another_jobs_is_named(
    submit: Submit, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    until_saved = (
        'until [[ -f "$CHECKPOINT/latest_checkpointed_iteration.txt" ]]; do sleep 0.1; done'
    )
    options = (*ONE_NODE, "--job-name=first")
    first = submit(options, until_saved)
    first.wait_for_text("started:")
    second = submit(options, until_saved)
    assert second.end() == "FAILED"
    whose = f"job {first.name} (first)"
    assert f"{folder} is in use by {whose}; give this job another CHECKPOINT" in second.log
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    assert first.end() == "COMPLETED", first.log

    third = submit(options, until_saved)
    assert third.end() == "COMPLETED"
    assert f"{folder} holds step 10 of {whose}" in third.log
    assert "nothing is left to do" in third.log and "started:" not in third.log


@pytest.mark.nightly
def test_of_two_jobs_that_start_together_one_takes_a_new_folder(
    slurm_cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    body = f"""
        until [[ -e "$CHECKPOINT/../refused" ]]; do sleep 0.1; done
        {SAVE_ALL}"""
    jobs = [submit((*ONE_NODE, "--hold"), body) for _ in range(2)]
    slurm_cluster.run("scontrol", "release", ",".join(job.name for job in jobs))
    jobs[0].wait_until(lambda: "FAILED" in [job.field("JobState") for job in jobs], "refused")
    (tmp_path / "refused").touch()
    assert sorted(job.end() for job in jobs) == ["COMPLETED", "FAILED"]
    refused, winner = sorted(jobs, key=lambda job: job.field("JobState") == "COMPLETED")
    # The winner's own name may not be there yet.
    assert re.search(rf"{tmp_path}/run is in use by job {winner.name}( \(|;)", refused.log)
    assert "started:" not in refused.log and winner.log.count("started:") == 1


@pytest.mark.nightly
def test_a_shells_text_in_a_variable_is_not_run(slurm_cluster: Cluster, tmp_path: Path) -> None:
    text = "a $(touch ran)`touch ran`; touch ran #'\""
    more = {"CHECKPOINT": f"{tmp_path}/{text}", "LOG_DIR": f"{tmp_path}/{text} logs"}
    variables = settings(tmp_path, SAVE_ALL, **more, MASTER_ADDR=text)
    program = tmp_path / f"{text} python"
    program.symlink_to(variables["PYTHON"])
    job = slurm_cluster.submit(
        *(*ONE_NODE, f"--job-name={text}", f"--chdir={tmp_path}", str(SBATCH), str(SCRIPT)),
        *("--train-iters", "10", "--data-path", text),
        environment=variables | {"PYTHON": str(program)},
    )
    assert job.end() == "COMPLETED", job.log
    assert "started:" in job.log
    called = Path(f"{program}.started").read_text()
    for words in (f"--master-addr {text} --", f"--log-dir {more['LOG_DIR']}/", f"path {text}\n"):
        assert words in called
    assert f"whose=job {job.name} ({text})" in Path(more["CHECKPOINT"], "slurm-run.txt").read_text()
    assert not (tmp_path / "ran").exists()


def test_a_task_of_an_array_requeues_itself_alone(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The last task of an array has the number of the whole array."""
    # The second task stops halfway and then waits for the first to end.
    body = """
        step=10; [[ $CHECKPOINT == */1 || $SLURM_RESTART_COUNT == 1 ]] || step=5
        echo "$step" >"$CHECKPOINT/latest_checkpointed_iteration.txt"
        ((step == 10)) || until [[ -f $CHECKPOINT/../ended ]]; do sleep 0.1; done"""
    own = shlex.quote(f"{tmp_path}/")
    wrapped = f"CHECKPOINT={own}$SLURM_ARRAY_TASK_ID bash {SBATCH} {SCRIPT} --train-iters 10"
    array = slurm_cluster.submit(
        *("--array=1-2", "--requeue", *ONE_NODE, "--exclusive", f"--wrap={wrapped}"),
        environment=settings(tmp_path, body),
        log="%A_%a",
    )
    others, requeued = (replace(array, name=f"{array.name}_{task}") for task in (1, 2))
    assert others.end() == "COMPLETED", others.log
    (tmp_path / "ended").touch()
    requeued.wait_for_text("requeued (1 of 100)")
    requeued.restart_now()
    assert requeued.end() == "COMPLETED", requeued.log
    assert [job.field("Restarts") for job in (others, requeued)] == ["0", "1"]


def test_tasks_of_an_array_that_run_one_by_one_are_a_chain(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    body = 'echo $((5 * SLURM_ARRAY_TASK_ID)) >"$CHECKPOINT/latest_checkpointed_iteration.txt"'
    array = slurm_cluster.submit(
        *("--array=1-2%1", "--no-requeue", *ONE_NODE, str(SBATCH), str(SCRIPT)),
        *("--train-iters", "10"),
        environment=settings(tmp_path, body, CHECKPOINT=str(tmp_path / "run")),
        log="%A_%a",
    )
    first, second = (replace(array, name=f"{array.name}_{task}") for task in (1, 2))
    for job in (first, second):
        assert job.end() == "COMPLETED", job.log
        assert "started:" in job.log
    assert "requeue is off for this job" in first.log
    assert f"{tmp_path}/run holds step 5 of job {first.name} (megatron-laer); " in second.log
