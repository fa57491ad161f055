"""Files for pre-commit, the hosting platform and citation tools agree with the project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_laer
from tests.documents import ROOT, project_files

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# A longer file states why it is not split.
MOST_LINES = 400
OVER = re.compile(rf"^(?:# )?Over {MOST_LINES} lines: \S.*\.$", re.MULTILINE)
SOURCES = {".py", ".cpp", ".hpp", ".sh", ".sbatch"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.name


def test_the_citation_has_the_version_and_names_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == megatron_laer.__version__
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2602.11686"


def test_hooks_run_every_linter_of_the_test_script() -> None:
    script = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    checks = re.findall(r'^check "?((?<=")[^"]+|\w+)"? ', script, re.MULTILINE)
    assert len(checks) >= 4
    assert {*checks, "import-linter"} <= {hook["name"] for hook in repository["hooks"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_a_workflow_may_only_read_and_pins_what_it_uses(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    uses = [step["uses"] for step in steps if "uses" in step]
    assert [action for action in uses if not re.fullmatch(r"actions/[\w-]+@v\d+", action)] == []
    # The workflows hold no logic: their commands can be run by hand.
    ours = r"(scripts/(test|release)\.sh|\.ci/run)\b"
    programs = [re.search(ours, step["run"]) for step in steps if "run" in step]
    assert programs and all(programs)
    # Jobs that write are separate, and wait for a person's approval.
    writing = {name: job for name, job in workflow["jobs"].items() if "permissions" in job}
    assert {*writing} <= {"publish", "page"}
    assert all(job["environment"] and job["if"] for job in writing.values())
    # A program installed under one right must not find another.
    rights = [[*job["permissions"].values()].count("write") for job in writing.values()]
    assert rights == [1] * len(writing)


def test_a_file_of_many_lines_says_why_it_is_not_split() -> None:
    texts = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8")
        for path in project_files()
        if path.suffix in SOURCES
    }
    long = {path for path, text in texts.items() if text.count("\n") > MOST_LINES}
    assert long == {path for path, text in texts.items() if OVER.search(text)}
