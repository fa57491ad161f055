"""A job's settings are judged without Megatron, by the checks of training."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laer.tools.model_flags import model_flags
from megatron_laer.tools.recipes import job
from tests import processes

_TINY = model_flags("tiny-moe")  # of 8 experts


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
def test_jobs_that_can_run_are_left_alone(ranks: int, mode: str, flags: str) -> None:
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
        (8, "fsep", "--expert-parallel-mode none", "invalid choice: 'none'"),
    ],
)
def test_jobs_that_cannot_run_are_refused(ranks: int, mode: str, flags: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        job.check(words(flags), ranks, mode, {})
    assert message in str(refused.value)


def test_a_tokenizer_is_a_folder_with_one_and_needs_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_folders_of_a_job_are_tried_and_not_made(tmp_path: Path) -> None:
    flags = words("--expert-model-parallel-size 8")
    new = tmp_path / "new" / "folder"
    job.check(flags, 8, "fsep", {"CHECKPOINT": str(new), "LOG_DIR": str(new)})
    assert not new.parent.exists()
    for name in ("CHECKPOINT", "LOG_DIR"):
        with pytest.raises(ValueError, match=f"{name} '/proc/x': the folder '/proc' cannot be"):
            job.check(flags, 8, "fsep", {name: "/proc/x"})


def test_flags_are_printed_or_one_line_without_megatron_and_torch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--", "--expert-model-parallel-size", "2"]
    assert job.main(["tiny-moe", "2", "fsep", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == _TINY
    assert job.main(["tiny-moe", "1", "fsep", *flags]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert printed.err.endswith("(EP_SIZE sets --expert-model-parallel-size)\n")
    assert job.main(["--", "2", "fsep", *flags]) == 2
    assert "unknown model '--'" in capsys.readouterr().err

    module = "megatron_laer.tools.recipes.job"
    imported = f"import sys, {module}; print(*{{'torch', 'megatron'}} & {{*sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-P", "-c", imported],
        env={"PYTHONPATH": processes.python_path()},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "\n", result.stderr
