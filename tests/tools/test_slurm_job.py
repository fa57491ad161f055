"""A Slurm job's settings are judged without Megatron, by the checks of training."""

import subprocess
import sys

import pytest

from megatron_laer.tools.cli import slurm_job as job
from megatron_laer.tools.model_flags import model_flags
from tests import processes

_TINY = model_flags("tiny-moe")  # has 8 experts


def words(text: str) -> list[str]:
    return [*_TINY, *text.split()]


@pytest.mark.parametrize(
    ("ranks", "mode", "flags"),
    [
        (2, "fsep", "--expert-model-parallel-size 2"),
        (16, "fsep", "--expert-model-parallel-size 16 --fsep-capacity 3"),
        (16, "standard", "--expert-model-parallel-size 8"),
        (1, "standard", ""),
        # The last one counts.
        (1, "fsep", "--expert-parallel-mode standard"),
        (3, "fsep", "--expert-model-parallel-size 2 --expert-model-parallel-size=3"),
        (8, "both", "--expert-model-parallel-size 4 --fsep-capacity 4 --some-flag 1 2"),
        (4, "fsep", "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (2, "fsep", "--expert-model-parallel-size 2 --fp8-format e4m3"
         " --fsep-allow-unproven dense-fp8"),
    ],
)  # fmt: skip
def test_jobs_that_can_run_are_left_alone(ranks, mode, flags):
    job.check(words(flags), ranks, mode, {})


@pytest.mark.parametrize(
    ("ranks", "mode", "flags", "message"),
    [
        (2, "fsep", "--expert-model-parallel-size 3", "must be at most the number of ranks, 2"),
        (8, "fsep", "--expert-model-parallel-size 1", "give --expert-model-parallel-size 2 or"),
        (8, "fsep", "--expert-model-parallel-size 3", "divide the 8 ranks; give one that does"),
        (8, "standard", "--expert-model-parallel-size 3", "--num-experts 8 on --expert-model"),
        (16, "both", "--expert-model-parallel-size 16", "experts must divide evenly"),
        (8, "fsep", "--expert-model-parallel-size 8 --fsep-capacity 9", "use 1 to 8"),
        (8, "standard", "--fsep-capacity 9", "no effect with --expert-parallel-mode standard"),
        (8, "fsep", "--expert-model-parallel-size 8 --tensor-model-parallel-size 3", "is 3, which"),
        (8, "fsep", "--expert-model-parallel-size 8 --fsep-plan-lag 0", "must be at least 1"),
        (8, "fsep", "--expert-model-parallel-size -1", "'-1' is no integer in 1..999999999"),
        (8, "fsep", "--expert-model-parallel-size 8 --fp8-format e4m3", "nobody has run it"),
    ],
)
def test_jobs_that_cannot_run_are_refused(ranks, mode, flags, message):
    with pytest.raises(ValueError) as refused:
        job.check(words(flags), ranks, mode, {})
    assert message in str(refused.value)


def test_a_tokenizer_is_a_folder_with_one_and_needs_transformers(tmp_path, monkeypatch):
    flags = words("--expert-model-parallel-size 8")
    job.check(flags, 8, "fsep", {"TOKENIZER": "bytes"})
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="is no folder with a Hugging Face tokenizer"):
            job.check(flags, 8, "fsep", {"TOKENIZER": str(folder)})
    (tmp_path / "vocab.json").touch()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="-m pip install transformers, or TOKENIZER=bytes"):
        job.check(flags, 8, "fsep", {"TOKENIZER": str(tmp_path)})
    monkeypatch.delitem(sys.modules, "transformers")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "transformers.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    job.check(flags, 8, "fsep", {"TOKENIZER": str(tmp_path)})


def test_folders_of_a_job_are_tried_and_not_made(tmp_path):
    flags = words("--expert-model-parallel-size 8")
    new = tmp_path / "new" / "folder"
    job.check(flags, 8, "fsep", {"CHECKPOINT": str(new), "LOG_DIR": str(new)})
    assert not new.parent.exists()
    for name in ("CHECKPOINT", "LOG_DIR"):
        with pytest.raises(ValueError, match=f"{name} '/proc/x': the folder '/proc' cannot be"):
            job.check(flags, 8, "fsep", {name: "/proc/x"})


SETTINGS = {"MODEL": "tiny-moe", "DATA_PREFIX": "/data"}


def settings_of(flags: str = "", **more: str) -> dict[str, str | list[str]]:
    return job.job_settings(flags.split(), 8, SETTINGS | more)


def test_flags_of_fsep_are_for_its_run_alone_where_both_run():
    flags = "--fsep-late-plan wait --lr 3e-4 --fsep-plan-lag=2 --seed 5"
    found = settings_of(flags, MODE="both", CAPACITY="3", EP_SIZE="4", DATA_CACHE="/a b")
    assert found["user_flags_fsep"] == ["--fsep-capacity", "3", *flags.split()]
    assert found["user_flags_standard"] == "--lr 3e-4 --seed 5".split()
    training = found["training_flags"]
    assert isinstance(training, list) and training[: len(_TINY)] == _TINY
    assert training[-6:-2] == [
        *("--expert-model-parallel-size", "4"),
        *("--expert-tensor-parallel-size", "1"),
    ]
    assert training[-2:] == ["--data-cache-path", "/a b"]
    # Within one run they may not be ignored silently.
    with pytest.raises(ValueError, match="no effect with --expert-parallel-mode standard"):
        settings_of(flags, MODE="standard")


def test_streams_are_kept_apart_unless_megatron_forbids_it_and_the_last_value_counts():
    for flags, connections in (
        ("", "32"),
        ("--tensor-model-parallel-size 1", "32"),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 4", "1"),
        ("--context-parallel-size=4", "1"),
    ):
        assert settings_of(flags)["connections"] == connections
    found = settings_of("--train-iters 5 --train-iters=7 --exit-signal SIGTERM")
    assert (found["steps"], found["exit_signal"]) == ("7", "SIGTERM")
    assert (settings_of()["steps"], settings_of()["exit_signal"]) == ("1000", "")


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ("", {"EP_SIZE": "16"}, "must be at most the number of ranks, 8"),
        ("word", {}, "'word' is no flag of Megatron's"),
        ("--lr 1 --load=x", {"CHECKPOINT": "/run"}, "--pretrained-checkpoint"),
        ("--train-iters many", {}, "--train-iters many is no number of steps"),
        ("--train-samples=8", {}, "counted in steps; give --train-iters"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, settings, message):
    with pytest.raises(ValueError) as refused:
        settings_of(flags, **settings)
    assert message in str(refused.value)


def test_variables_are_printed_or_one_line_without_megatron_and_torch(capsys, monkeypatch):
    for name, value in (SETTINGS | {"DATA_PREFIX": "/a $b"}).items():
        monkeypatch.setenv(name, value)
    assert job.main(["1", "2"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("training_flags=(--num-layers 4 ") and "--data-path '/a $b' " in first
    assert last == "exit_signal=''"
    monkeypatch.setenv("MODEL", "--\x1b[2J")
    assert job.main(["1", "2"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1 and "\x1b" not in printed.err
    monkeypatch.setenv("MODEL", "tiny-moe")
    assert job.main(["1", "1"]) == 2
    assert capsys.readouterr().err.endswith("(EP_SIZE sets --expert-model-parallel-size)\n")

    module = job.__name__
    imported = f"import sys, {module}; print(*{{'torch', 'megatron'}} & {{*sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-P", "-c", imported],
        env={"PYTHONPATH": processes.python_path()},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "\n", result.stderr
