"""Jobs that share a CHECKPOINT train one at a time and log the job whose step they resume.

squeue and scontrol are replaced: a job runs while a file has its number.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.shell_scripts import shell

_ROOT = Path(__file__).resolve().parents[2]
_SBATCH = _ROOT / "scripts" / "slurm" / "pretrain.sbatch"

# The script's functions without their call, and without its waits of ten seconds.
_FUNCTIONS = f"""
source <(sed '$d' {shlex.quote(str(_SBATCH))})
stalled=false kills=0 before=0
sleep() {{ echo slept >>slept; }}
squeue() {{
    [[ ! -e squeue ]] || eval "$(<squeue)"
    local job=${{*: -1}}
    cat "known.$job" 2>/dev/null && return
    echo "slurm_load_jobs error: Invalid job id specified" >&2
    return 1
}}
claim() {{
    job=$1 me=$1 checkpoint=$2
    claim_checkpoint
    echo "$1" >>"$2.won"
}}
"""


def run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    return shell("-c", _FUNCTIONS + text, cwd=folder)


def claim(folder: Path, job: int, **settings: str) -> subprocess.CompletedProcess[str]:
    """Claim the folder `run` for a job, which then runs; `settings` are variables of the script."""
    (folder / f"known.{job}").write_text("RUNNING\n")
    set_here = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    return run(folder, f"{set_here}\nclaim {job} run")


def end(folder: Path, job: int, step: int | None = None) -> None:
    (folder / f"known.{job}").write_text("")
    if step is not None:
        (folder / "run" / "latest_checkpointed_iteration.txt").write_text(str(step))


# The folder is new, or claimed: by an ended job, known to Slurm or not, or by one of the jobs
# before its requeue. Or its claims were removed, as the refusal says.
_BEFORE = """
case $((pair % 5)) in
    1) (claim 1 "$folder") 2>>log ;;
    2) (claim 2 "$folder") 2>>log ;;
    3) (claim 1 "$folder" && rm -r "$folder/slurm-claims") 2>>log ;;
    4) (claim $((1000 + pair)) "$folder") 2>>log ;;
esac
"""


def test_of_two_jobs_at_once_exactly_one_takes_a_folder(tmp_path: Path) -> None:
    pairs = 40
    (tmp_path / "known.2").touch()
    result = run(
        tmp_path,
        f"""
        for ((pair = 0; pair < {pairs}; pair++)); do
            folder=folder$pair
            {_BEFORE}
            rm -f "$folder.won"
            for job in $((1000 + pair)) $((2000 + pair)); do
                echo RUNNING >"known.$job"
                (until [[ -e go$pair ]]; do :; done; claim "$job" "$folder") 2>>log &
            done
            >"go$pair"
            wait
        done""",
    )
    assert result.returncode == 0, result.stderr
    winners = [
        [int(job) for job in (tmp_path / f"folder{pair}.won").read_text().split()]
        for pair in range(pairs)
    ]
    assert [len(jobs) for jobs in winners] == [1] * pairs
    log = (tmp_path / "log").read_text()
    assert log.count("is in use by job ") == pairs
    for pair, (winner,) in enumerate(winners):
        assert f"job={winner}\n" in (tmp_path / f"folder{pair}" / "slurm-run.txt").read_text()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; return 1",
            "squeue says 'slurm_load_jobs error: Unable to contact slurm controller'",
        ),
        ("return 127", "squeue says ''"),
        ("echo COMPLETING; return", "squeue says 'COMPLETING'"),
    ],
    ids=["squeue fails", "no squeue", "the job is ending"],
)
def test_a_job_waits_and_then_refuses_what_squeue_does_not_say_is_free(
    tmp_path: Path, answer: str, said: str
) -> None:
    assert claim(tmp_path, 7).returncode == 0
    (tmp_path / "squeue").write_text(answer)
    refused = claim(tmp_path, 8)
    assert refused.returncode == 2
    assert f"run may be in use by job 7 (without Slurm): {said}" in refused.stderr
    assert "if that job has ended, remove run/slurm-claims" in refused.stderr
    assert (tmp_path / "slept").read_text().count("slept") > 5
    # That is enough, though squeue still does not say.
    shutil.rmtree(tmp_path / "run" / "slurm-claims")
    assert claim(tmp_path, 8).returncode == 0
    # It answers while another job waits.
    end(tmp_path, 8)
    (tmp_path / "squeue").write_text(f"[[ -e asked ]] || {{ >asked; {answer}; }}")
    assert claim(tmp_path, 9).returncode == 0


def test_a_step_is_of_the_job_that_saved_it_and_not_of_one_that_began_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    end(tmp_path, 1, step=3)
    assert "step 3 of a run that was not started by this script" in claim(tmp_path, 4).stderr
    end(tmp_path, 4)
    claim(tmp_path, 5, SLURM_JOB_NAME="first")
    end(tmp_path, 5, step=40)
    whose = "run holds step 40 of job 5 (first); the run goes on from it"
    for job in (6, 7):  # both fail while they load
        assert whose in claim(tmp_path, job, SLURM_JOB_NAME="O1").stderr
        end(tmp_path, job)
    claim(tmp_path, 9, SLURM_JOB_NAME="last")
    end(tmp_path, 9, step=50)
    assert "run holds step 50 of job 9 (last)" in claim(tmp_path, 10).stderr


@pytest.mark.parametrize(
    ("ended_by", "before", "exit_signal", "goes_on"),
    [
        ("Slurm", False, "", True),
        ("Slurm", False, "SIGUSR1", True),
        ("ranks", False, "", False),
        ("", False, "", True),  # all were killed at once
        ("killed", True, "", True),
        ("Slurm", True, "", False),
        ("Slurm", False, "SIGTERM", False),
    ],
)
def test_a_step_that_slurm_ended_is_made_again_once(
    tmp_path: Path, ended_by: str, before: bool, exit_signal: str, goes_on: bool
) -> None:
    if before:
        claim(tmp_path, 7)
    result = run(
        tmp_path,
        f"""
        >known.7
        claim 7 run
        words=(--lr 1 {f"--exit-signal {exit_signal}" if exit_signal else ""}) mark=run/ended-by
        [[ -z '{ended_by}' ]] || ln -s '{ended_by}' "$mark"
        slurm_ended_it && echo again || echo no""",
    )
    assert result.stdout == ("again\n" if goes_on else "no\n")


@pytest.mark.parametrize(
    ("ends", "requeued"),
    [
        (["killed", "killed", "killed"], [True, True, False]),
        (["killed", "killed", "well+", "killed"], [True, True, True, True]),
        (["killed", "killed", "Slurm+", "killed"], [True, True, True, True]),
        (["killed+", "killed+", "killed+", "killed+"], [True, True, True, True]),
        (["killed", "killed", "killed+", "killed", "killed", "killed"], [True] * 5 + [False]),
        # A run in the same job that ended otherwise counts too.
        (["killed", "killed", "Slurm killed"], [True, True, True]),
        (["killed", "killed killed", "killed"], [True, True, False]),
    ],
)
def test_a_job_that_is_killed_again_and_again_is_requeued_twice(
    tmp_path: Path, ends: list[str], requeued: list[bool]
) -> None:
    """A run whose end has a plus saves a step before it. A job's ends are those of its runs."""
    (tmp_path / "known.7").touch()
    for number, runs in enumerate(ends):
        restarts = len(runs.split()) - 1
        result = run(
            tmp_path,
            f"""
            job=7 me=7 checkpoint=run mark=run/ended-by words=(--lr 1) steps=99 run=0 on_nodes=()
            MAX_RESTARTS={restarts} runs=({runs})
            launch() {{
                local end=${{runs[run]}}
                run=$((run + 1)) ended=false
                rm -f "$mark"
                [[ $end != *+ ]] || echo {10 * number + 10} >run/latest_checkpointed_iteration.txt
                [[ $end == well+ ]] || ln -s "${{end%+}}" "$mark"
                [[ $end == well+ ]] || return 137
            }}
            requeue() {{ echo requeued; exit "$1"; }}
            train""",
        )
        assert (result.stdout == "requeued\n") == requeued[number], (number, result.stderr)
    out = "torchrun was killed 3 times in a row: out of memory?"
    assert (out in result.stderr) == (not requeued[-1])
    if not requeued[-1]:
        assert result.returncode == 137
        saved = [10 * number for number, end in enumerate(ends, start=1) if end.endswith("+")]
        assert f"goes on from step {max(saved, default=0)}" in result.stderr


def test_a_link_in_the_place_of_the_record_or_of_a_new_one_leads_to_no_other_file(
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    other.write_text("other\n")
    (tmp_path / "run").mkdir()
    for name in ("slurm-run.txt", "slurm-run.txt.new"):
        (tmp_path / "run" / name).symlink_to(other)
    result = claim(tmp_path, 7)
    assert result.returncode == 0, result.stderr
    record = tmp_path / "run" / "slurm-run.txt"
    assert record.read_text().startswith("job=7\n") and not record.is_symlink()
    assert record.stat().st_mode & 0o777 == 0o666 & ~_umask()
    record.unlink()
    record.symlink_to(other)
    killed = "checkpoint=run before=0 kills=0\nsaved_step() { echo 0; }\nkilled_seldom"
    assert run(tmp_path, killed).returncode == 0
    assert record.read_text().endswith("kills=1\n") and not record.is_symlink()
    assert other.read_text() == "other\n"
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"slurm-run.txt", "slurm-run.txt.new", "slurm-claims"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
