"""The Slurm script runs with replacements of Slurm, on this machine alone."""

import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from tests import processes, slurm
from tests.unit.shell_scripts import fake_python, shell

_ROOT = Path(__file__).resolve().parents[2]
_SBATCH = _ROOT / "scripts" / "slurm" / "pretrain.sbatch"


@pytest.fixture
def fake_slurm(tmp_path):
    """Make a folder with replacements of scontrol and srun, and a three-node job's environment."""
    fake_python(
        tmp_path, "scontrol", '[ "$*" = "show hostnames n[7-9]" ] && printf "n7\\nn8\\nn9\\n"'
    )
    fake_python(tmp_path, "srun", 'until [ -x "$1" ]; do shift; done; exec "$@"')
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "n[7-9]",
        "SLURM_GPUS_PER_NODE": "8",
    }


_SCRIPT = str(_ROOT / "pretrain_gpt.py")


def slurm_command(*words, **environment):
    result = shell(_SBATCH, _SCRIPT, *words, DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def value_of(flag, command):
    return command[len(command) - command[::-1].index(flag)]


def test_a_container_is_given_to_srun_with_its_mounts(fake_slurm):
    container = {"CONTAINER_IMAGE": "/images/a b.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    words = slurm_command(**fake_slurm, SLURM_CPUS_PER_TASK="4", **container)
    assert "--kill-on-bad-exit=1" in words and "CUDA_DEVICE_MAX_CONNECTIONS=32" in words
    assert "--container-image=/images/a b.sqsh" in words
    assert "--container-mounts=/data:/data" in words
    assert value_of("--cpus-per-task", words) == "4"


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, "4"),
        ({"SLURM_GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, "2"),
        ({"SLURM_GPUS_PER_NODE": "8", "GPUS_PER_NODE": "6"}, "6"),
        ({"SLURM_GPUS_PER_NODE": "", "SLURM_GPUS_ON_NODE": "3"}, "3"),
        ({"SLURM_GPUS_PER_NODE": ""}, "8"),
    ],
)
def test_ranks_per_node_are_the_gpus_that_were_asked_for(fake_slurm, environment, ranks):
    assert value_of("--nproc-per-node", slurm_command(**fake_slurm | environment)) == ranks


def test_a_checkpoint_is_saved_to_and_loaded_from_and_signals_save(tmp_path):
    folder = tmp_path / "run"
    soon = int(time.time()) + 3600
    settings = {"CHECKPOINT": str(folder), "MARGIN_MIN": "20", "SLURM_JOB_END_TIME": str(soon)}
    command = slurm_command(*("--save-interval", "7", "--train-iters=9"), **settings)
    assert value_of("--save", command) == value_of("--load", command) == str(folder)
    assert value_of("--save-interval", command) == "7"
    assert value_of("--exit-signal", command) == "SIGUSR1"
    # An hour less a margin of 20 minutes; the script may have waited for its turn.
    assert 20 <= int(value_of("--exit-duration-in-mins", command)) <= 40
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_JOB_ID", "x", "no whole number in 1..4294967295"),
        ("SLURM_JOB_ID", "12345678901", "no whole number in 1..4294967295"),
        ("SLURM_JOB_NUM_NODES", "a[$(touch ran)]", "no whole number in 1..999999"),
        ("SLURM_NODEID", "-1", "no whole number in 0..999999"),
        ("SLURM_JOB_END_TIME", "a[$(touch ran)]", "no whole number in 0..999999999999"),
        ("MASTER_PORT", "a[$(touch ran)]", "no whole number in 0..65535"),
        ("SLURM_RESTART_COUNT", "010", "no whole number in 0..999999"),
        ("SLURM_CPUS_PER_TASK", "0", "no whole number in 1..999999"),
        ("SLURM_GPUS_PER_NODE", "h100", "no number of GPUs per node in 1..9999; set GPUS_PER_NODE"),
        ("SLURM_JOB_NODELIST", "", "SLURM_JOB_ID=123456 is no job without SLURM_JOB_NODELIST"),
    ],
)
def test_numbers_of_slurm_are_checked_before_they_are_used(fake_slurm, tmp_path, name, value, said):
    folder = tmp_path / "run"
    more = {name: value, "CHECKPOINT": str(folder), "DRY_RUN": "1"}
    result = shell(_SBATCH, _SCRIPT, "--train-iters=9", cwd=tmp_path, **fake_slurm | more)
    expected = f"{name}={value} is {said}" if value else said
    assert (result.returncode, result.stderr) == (2, f"pretrain.sbatch: {expected}\n")
    assert not folder.exists() and not (tmp_path / "ran").exists()


def test_both_scripts_check_numbers_by_the_same_functions():
    """Slurm copies the submitted script alone, so they cannot share a file."""
    scripts = _SBATCH, _SBATCH.with_name("gpu_check.sbatch")
    for name in ("check_numbers", "count_gpus"):
        texts = [path.read_text().split(f"\n{name}() {{\n")[1] for path in scripts]
        bodies = {text.split("\n}\n")[0] for text in texts}
        assert len(bodies) == 1


@pytest.mark.parametrize("dry", ["1", "yes"])
def test_flags_keep_their_words(dry):
    words = (_SCRIPT, "--lr", "3e-4", "--data-cache-path", "a b")
    result = shell(_SBATCH, *words, DRY_RUN=dry, CUDA_DEVICE_MAX_CONNECTIONS="8")
    command = shlex.split(result.stdout)
    assert "srun" not in command and "CUDA_DEVICE_MAX_CONNECTIONS=8" in command
    assert value_of("--lr", command) == "3e-4"
    assert value_of("--data-cache-path", command) == "a b"


_MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-experts 8"
_FSEP = f"{_SCRIPT} {_MODEL} --lr 1e-4 --bf16 --expert-parallel-mode fsep".split()


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        ("--expert-model-parallel-size 4", 0, "runs; "),
        ("--expert-model-parallel-size 8", 2, "must be at most the number of ranks, 4"),
    ],
)
def test_flags_of_fsep_are_judged_once_before_ranks_start(flags, status, said):
    python = {"PYTHON": sys.executable, "PYTHONPATH": processes.python_path()}
    settings = {"DRY_RUN": "1", "SLURM_JOB_NUM_NODES": "2", "GPUS_PER_NODE": "2"}
    result = shell(_SBATCH, *_FSEP, *flags.split(), **settings, **python)
    assert (result.returncode, bool(result.stdout)) == (status, not status), result.stderr
    assert said in result.stderr
    assert ("check-recipe says above why" in result.stderr) == bool(status)


@pytest.mark.parametrize(
    ("last_line", "status", "restarts"),
    [("raise VerificationError('found')", 86, 0), ("sys.exit(3)", 1, 1)],
)
def test_ranks_that_found_wrong_weights_end_the_script_with_their_status(
    tmp_path, last_line, status, restarts
):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from megatron_laer.verify.checked import VerificationError, end_with_status\n"
        f"end_with_status()\n{last_line}\n"
    )
    settings = {"PYTHON": sys.executable, "PYTHONPATH": processes.python_path()}
    settings |= {"GPUS_PER_NODE": "2", "CHECKPOINT": str(tmp_path / "run"), "MAX_RESTARTS": "1"}
    settings["MASTER_PORT"] = str(*slurm.free_ports("127.0.0.1", 1))
    result = shell(_SBATCH, script, "--train-iters", "5", **settings)
    assert result.returncode == status, result.stderr
    assert result.stderr.count("it is started again") == restarts
    found = "ranks found wrong weights, gradients or tokens"
    assert (found in result.stderr) == (status == 86)


def test_the_command_to_install_slurm_is_the_same_everywhere():
    script = (_ROOT / ".ci" / "run").read_text()
    assert f"packages=({slurm.PACKAGES})" in script
    assert f"export {slurm.NEEDED_VARIABLE}=1" in script
    assert f"\n{slurm.INSTALL}\n" in (_ROOT / "docs" / "slurm.md").read_text()
