"""The Slurm script runs with replacements of Slurm, on this machine alone."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_laer.device import CPU_FLAGS
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


def slurm_command(*words, **environment):
    result = shell(_SBATCH, *words, DRY_RUN="1", PYTHON=sys.executable, **environment)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def value_of(flag, command):
    return command[len(command) - command[::-1].index(flag)]


def test_the_slurm_script_starts_a_launcher_per_node_and_meets_on_the_first(fake_slurm, tmp_path):
    (tmp_path / "transformers.py").touch()
    (tmp_path / "tokenizer.json").touch()
    command = slurm_command(
        **fake_slurm,
        PYTHONPATH=f"{processes.python_path()}:{tmp_path}",
        MODEL="mixtral-8x7b-e8k2",
        DATA_PREFIX="/data/text",
        TOKENIZER=str(tmp_path),
        CAPACITY="2",
        DATA_CACHE="/shared/cache",
    )
    srun = command[command.index("srun") : command.index("bash")]
    assert srun[:5] == ["srun", "--nodes", "3", "--ntasks", "3"]
    assert value_of("--master-addr", command) == "n7"
    assert value_of("--master-port", command) == str(20000 + 123456 * 8 % 12000)
    assert value_of("--nnodes", command) == "3"
    assert value_of("--nproc-per-node", command) == "8"
    assert value_of("--expert-model-parallel-size", command) == "24"
    assert value_of("--fsep-capacity", command) == "2"
    assert value_of("--num-layers", command) == "32"
    assert value_of("--tokenizer-model", command) == str(tmp_path)
    assert value_of("--data-cache-path", command) == "/shared/cache"


# Their value is optional, so a following word is the command to run.
_OPTIONAL_VALUES = {
    *("--accel-bind", "--exclusive", "--get-user-env", "--kill-on-bad-exit", "--label"),
    *("--nice", "--overlap", "--propagate", "--x11"),
}


def test_options_of_srun_whose_value_may_be_left_out_have_none_as_a_word(fake_slurm):
    container = {"CONTAINER_IMAGE": "/images/a b.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    words = slurm_command(**fake_slurm, **MODEL_AND_DATA, SLURM_CPUS_PER_TASK="4", **container)
    assert "--kill-on-bad-exit=1" in words and "CUDA_DEVICE_MAX_CONNECTIONS=32" in words
    assert "--container-image=/images/a b.sqsh" in words
    assert f"--container-mounts={_ROOT}:{_ROOT},/data:/data" in words
    options = iter(words[words.index("srun") + 1 : words.index("bash")])
    for option in options:
        assert option.startswith("--"), f"srun would run {option}"
        if "=" not in option and option not in _OPTIONAL_VALUES:
            assert not next(options).startswith("--")


@pytest.mark.parametrize(
    ("environment", "ranks", "said"),
    [
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, "4", None),
        ({"SLURM_GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, "2", "holds 8 GPUs per node"),
        ({"SLURM_GPUS_PER_NODE": "8", "GPUS_PER_NODE": "6"}, "6", None),
        ({"SLURM_GPUS_PER_NODE": "", "SLURM_GPUS_ON_NODE": "3"}, "3", None),
        ({"SLURM_GPUS_PER_NODE": ""}, "8", "GPUS_PER_NODE=8 is assumed"),
        ({"SLURM_CPUS_ON_NODE": "1"}, "8", "8 ranks per node share 1 CPUs"),
    ],
)
def test_ranks_per_node_are_the_gpus_that_were_asked_for(fake_slurm, environment, ranks, said):
    settings = fake_slurm | {"MODEL": "tiny-moe", "DATA_PREFIX": "/data"} | environment
    result = shell(_SBATCH, DRY_RUN="1", PYTHON=sys.executable, **settings)
    assert value_of("--nproc-per-node", shlex.split(result.stdout)) == ranks
    assert (said or "") in result.stderr
    assert bool(said) == bool(result.stderr)


def test_a_checkpoint_is_saved_to_and_loaded_from_and_signals_save(tmp_path):
    folder = tmp_path / "run"
    soon = int(time.time()) + 3600
    settings = {"CHECKPOINT": str(folder), "MARGIN_MIN": "20", "SLURM_JOB_END_TIME": str(soon)}
    command = slurm_command(*("--", "--save-interval", "7"), **MODEL_AND_DATA, **settings)
    assert value_of("--save", command) == value_of("--load", command) == str(folder)
    assert value_of("--save-interval", command) == "7"
    assert value_of("--exit-signal", command) == "SIGUSR1"
    # An hour less a margin of 20 minutes; the script may have waited for its turn.
    assert 20 <= int(value_of("--exit-duration-in-mins", command)) <= 40
    assert not folder.exists()


def test_both_modes_are_two_runs_with_ports_and_folders_of_their_own(tmp_path):
    words = "-- --fsep-late-plan wait --lr 3e-4 --fsep-plan-lag=2 --seed 5".split()
    settings = MODEL_AND_DATA | {"MODE": "both", "CHECKPOINT": str(tmp_path), "CAPACITY": "3"}
    result = shell(_SBATCH, *words, DRY_RUN="1", PYTHON=sys.executable, **settings)
    fsep, standard = map(shlex.split, result.stdout.splitlines())
    assert value_of("--expert-parallel-mode", fsep) == "fsep"
    assert value_of("--expert-parallel-mode", standard) == "standard"
    for command, mode in ((fsep, "fsep"), (standard, "standard")):
        assert value_of("--load", command) == f"{tmp_path}/{mode}"
    # FSEP's flags go to one of the runs only; the other would refuse them.
    assert fsep[-9:] == ["--fsep-capacity", "3", *words[1:]]
    assert standard[-4:] == ["--lr", "3e-4", "--seed", "5"]
    assert not [word for word in standard if word.startswith("--fsep")]


@pytest.mark.parametrize("dry", ["1", "yes"])
def test_what_follows_the_dashes_wins_and_keeps_its_words(dry):
    words = ("--", "--lr", "3e-4", "--data-cache-path", "a b")
    settings = {"DRY_RUN": dry, "PYTHON": sys.executable, "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    result = shell(_SBATCH, *words, **MODEL_AND_DATA, **settings)
    command = shlex.split(result.stdout)
    assert "srun" not in command and "CUDA_DEVICE_MAX_CONNECTIONS=8" in command
    assert value_of("--lr", command) == "3e-4"
    assert value_of("--data-cache-path", command) == "a b"


MODEL_AND_DATA = {"MODEL": "tiny-moe", "DATA_PREFIX": "/data"}


# `tests/bad_inputs/batch.py` has the others.
@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ("", {"SLURM_JOB_END_TIME": "soon"}, "SLURM_JOB_END_TIME=soon is no whole number in 0..9"),
        ("", {"SLURM_GPUS_ON_NODE": "08"}, "'08' GPUs per node, which is no"),
        ("", {"MAX_RESTARTS": "5\x1b[2J"}, "MAX_RESTARTS=5?[2J is no whole"),
        ("", {"MODE": "both", "MASTER_PORT": "65535"}, "no whole number in 1024..65534\n"),
        ("", {"CAPACITY": "100000"}, "(CAPACITY sets --fsep-capacity)"),
        ("", {"CHECKPOINT": "/dev/null/run"}, "CHECKPOINT '/dev/null/run': '/dev/null' is no fol"),
        ("", {"CHECKPOINT": "/proc/self"}, "'/proc/self' cannot be written to"),
        ("", {"LOG_DIR": "/dev/null"}, "'/dev/null' is no folder; give"),
        ("word", {}, "'word' is no flag of Megatron's"),
        ("", {"PYTHON": "/bin/false"}, "/bin/false does not run Python"),
    ],
)
def test_a_slurm_job_with_bad_settings_stops_at_once(words, environment, message):
    settings = {"DRY_RUN": "1", "PYTHON": sys.executable} | MODEL_AND_DATA | environment
    result = shell(_SBATCH, "--", *words.split(), **settings)
    assert result.returncode == 2
    assert message in result.stderr
    assert not result.stdout


def test_a_copy_of_the_slurm_script_says_what_it_misses(tmp_path):
    copied = tmp_path / "pretrain.sbatch"
    shutil.copy(_SBATCH, copied)
    result = shell(copied, DRY_RUN="1", **MODEL_AND_DATA)
    assert result.returncode == 2
    assert f"{copied} is not in scripts/slurm of the repository" in result.stderr
    script = str(_ROOT / "pretrain_gpt.py")
    settings = {"PYTHON": sys.executable, "PYTHONPATH": processes.python_path(), "SCRIPT": script}
    result = shell(copied, DRY_RUN="1", **MODEL_AND_DATA, **settings)
    assert script in shlex.split(result.stdout), result.stderr


# Slurm's form of an array's last task; some releases show the script's arguments.
_TASKS = (
    "JobId=123457 ArrayJobId=123456 ArrayTaskId=1 Command=/else/where.sbatch WorkDir=/\n"
    f"JobId=123456 ArrayJobId=123456 ArrayTaskId=2 Requeue=0 Command={_SBATCH}{{}} WorkDir=/\n"
)


@pytest.mark.parametrize("words", ["", " -- --lr 3e-4", " --data-cache-path /a/b"])
def test_the_repository_is_found_from_a_job_and_also_from_a_task_of_an_array(
    fake_slurm, tmp_path, words
):
    copied = tmp_path / "slurm_script"
    shutil.copy(_SBATCH, copied)
    shown = shlex.quote(_TASKS.format(words))
    fake_python(tmp_path, "scontrol", f'[ "$2" = hostnames ] && echo n7 || printf "%s" {shown}')
    result = shell(copied, DRY_RUN="1", PYTHON=sys.executable, **fake_slurm, **MODEL_AND_DATA)
    assert str(_ROOT / "pretrain_gpt.py") in shlex.split(result.stdout), result.stderr


@pytest.mark.distributed
def test_the_slurm_command_line_trains_on_this_machine(text_data, tmp_path):
    result = shell(
        *(_SBATCH, "--", *CPU_FLAGS, "--train-iters", "2", "--global-batch-size", "4"),
        *("--eval-iters", "1", "--num-workers", "0", "--num-layers", "2", "--seq-length", "32"),
        *("--split", "90,10,0", "--data-cache-path", tmp_path),
        timeout_s=1800,
        PYTHON=sys.executable,
        PYTHONPATH=processes.python_path(),
        MODEL="tiny-moe",
        DATA_PREFIX=text_data,
        GPUS_PER_NODE="2",
        MEGATRON_LAER_DEVICE="cpu",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "fsep_load_imbalance" in result.stdout
    assert "validation loss at iteration 2" in result.stdout


@pytest.mark.parametrize("may_install", [True, False])
def test_continuous_integration_needs_slurm_once_it_is_there(tmp_path, may_install):
    for folder in (".ci", "scripts", "bin"):
        (tmp_path / folder).mkdir()
    script = (_ROOT / ".ci" / "run").read_text().replace("/usr/sbin", "/nowhere")
    script = script.replace("EUID == 0", "1")
    (tmp_path / ".ci" / "run").write_text(script)
    test = fake_python(tmp_path / "scripts", "test.sh", 'echo "needed: $MEGATRON_LAER_NEED_SLURM"')
    test.write_text(test.read_text().replace("#!/bin/sh", f"#!{shutil.which('bash')}"))
    for tool in ("dirname", "bash", "touch", "chmod"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    install = """
        [ "$1" = update ] && exit
        echo "$*" >>log
        for program in munged slurmctld slurmd sbatch; do touch bin/$program; done
        chmod +x bin/*"""
    fake_python(tmp_path / "bin", "apt-get", install if may_install else "exit 100")
    result = shell(tmp_path / ".ci" / "run", PATH=str(tmp_path / "bin"))
    assert result.returncode == 0, result.stderr
    assert f"needed: {'1' if may_install else ''}\n" in result.stdout
    if may_install:
        options = f"install -qq --no-install-recommends {slurm.PACKAGES}\n"
        assert (tmp_path / "log").read_text().startswith(options)
    else:
        assert "Slurm could not be installed" in result.stderr


@pytest.mark.parametrize(("needed", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_slurm_is_asked_for_by_name_where_it_is_missing(needed, outcome):
    run = (
        "import sys, pytest, tests.slurm; tests.slurm.PATH = '/nowhere'; "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    )
    test = "tests/distributed/test_slurm.py::test_without_a_checkpoint_a_job_is_not_requeued"
    result = subprocess.run(
        [sys.executable, "-c", run, test],
        env=os.environ | {slurm.NEEDED_VARIABLE: needed, "PYTHONPATH": processes.python_path()},
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert f"Slurm is not installed: {slurm.INSTALL} (missing: munged, " in result.stdout
    assert outcome in result.stdout
    assert "slurm jobs: 0 passed, " in result.stdout
    assert result.returncode == int(needed)


def test_the_command_to_install_slurm_is_the_same_everywhere():
    script = (_ROOT / ".ci" / "run").read_text()
    assert f"packages=({slurm.PACKAGES})" in script
    assert f"export {slurm.NEEDED_VARIABLE}=1" in script
    assert f"\n{slurm.INSTALL}\n" in (_ROOT / "docs" / "slurm.md").read_text()
