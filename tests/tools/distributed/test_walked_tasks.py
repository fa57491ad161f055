"""The tasks that CONTRIBUTING.md walks through can be done as they are printed.

A block of the page that begins with a path is an edit, which is made in a copy of the tree. The
tests that the task names then run there.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from itertools import groupby
from pathlib import Path

import pytest

from megatron_laer.telemetry.metrics import LOGGED
from megatron_laer.telemetry.statistics import LayerMetrics
from tests.documents import ROOT
from tests.planted.__main__ import copy_of_tree

_FENCE = re.compile(r"^( *)```\w+\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\./scripts/test\.sh (?:--all )?-- (.+)$", re.MULTILINE)
STRATEGY, METRIC, RULE, WAY = "A strategy", "A metric", "A rule", "A way of exchange"
FAILED = 1


def task(title: str) -> str:
    """Return the section of a task."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return page.partition(f"\n### {title}\n")[2].partition("\n### ")[0]


def blocks(section: str) -> list[str]:
    return [textwrap.dedent(match[2]) for match in _FENCE.finditer(section)]


def named_tests(section: str) -> list[str]:
    """Return the files of tests that a task's command runs."""
    (files,) = _COMMAND.findall("\n".join(blocks(section)))
    return files.split()


def edit(path: Path, lines: list[str]) -> None:
    """Write a new file, or add the lines with `+` between those without, which a file has once."""
    if not path.exists():
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return
    content = path.read_text(encoding="utf-8")
    for is_gap, group in groupby(lines, key=lambda line: line == "..."):
        if is_gap:
            continue
        part = list(group)
        assert {line[:1] for line in part} <= {"", " ", "+"}, part
        before, after = (
            "".join(f"{line[1:]}\n" for line in part if not line.startswith(left_out))
            for left_out in ("+", "-")
        )
        assert content.count(before) == 1, f"{path.name} has other lines than the page:\n{before}"
        content = content.replace(before, after)
    path.write_text(content, encoding="utf-8")


def make_edits(section: str, tree: Path) -> list[str]:
    """Make the edits of a task in a tree; return the files."""
    edits = [block.splitlines() for block in blocks(section)]
    edits = [lines for lines in edits if re.fullmatch(r"[\w/]+\.py:", lines[0])]
    for first, *lines in edits:
        edit(tree / first[:-1], lines)
    return [lines[0][:-1] for lines in edits]


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def run_tests(tree: Path, section: str) -> subprocess.CompletedProcess[str]:
    selection = "not gpu and not nightly"
    return run(tree, "pytest", "-q", "-x", "-m", selection, *named_tests(section))


@pytest.mark.parametrize("title", [STRATEGY, WAY])
def test_a_task_is_done_as_printed(title: str, tmp_path: Path) -> None:
    section, tree = task(title), copy_of_tree(tmp_path)
    edited = make_edits(section, tree)
    assert len(edited) == 2
    for words in (["ruff", "check"], ["ruff", "format", "--check"]):
        done = run(tree, *words, *edited)
        assert done.returncode == 0, done.stdout + done.stderr
    done = run_tests(tree, section)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("title", "right", "wrong"),
    [
        (STRATEGY, "geometry.check_layout(current)", "pass"),
        (STRATEGY, 'name: str = "lazy"', 'name: str = "idle"'),
        (WAY, "*spread, RACK_NODES * geometry.node_size,", "*spread, 3 * geometry.node_size,"),
        (WAY, "RACK_NODES * geometry.node_size, *nodes", "*nodes, RACK_NODES * geometry.node_size"),
        (WAY, "*spread, RACK_NODES", "RACK_NODES"),
    ],
)
def test_the_tests_of_a_task_notice_a_wrong_step(
    title: str, right: str, wrong: str, tmp_path: Path
) -> None:
    section, tree = task(title), copy_of_tree(tmp_path)
    assert section.count(right) == 1
    make_edits(section.replace(right, wrong), tree)
    done = run_tests(tree, section)
    assert done.returncode == FAILED, done.stdout + done.stderr


@pytest.mark.parametrize("title", [STRATEGY, METRIC, RULE, WAY])
def test_tests_that_a_task_names_exist(title: str) -> None:
    files = named_tests(task(title))
    assert len(files) >= 2
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_metric_is_in_the_places_that_its_task_names() -> None:
    section = task(METRIC)
    assert "the field `fresh_layouts` of `LayerMetrics`" in section
    assert "fresh_layouts" in {field.name for field in dataclasses.fields(LayerMetrics)}
    assert [row.of for row in LOGGED if row.name == "fsep_fresh_layouts"] == ["fresh_layouts"]
    meanings = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert re.search(r"^\| `fsep_fresh_layouts` \|", meanings, re.MULTILINE)
    (line,) = re.findall(r"`(all\([^`]+\))`", section)
    tests = (ROOT / "tests" / "distributed" / "test_metrics.py").read_text(encoding="utf-8")
    assert f"    assert {' '.join(line.split())}\n" in tests


def test_the_rule_is_an_entry_as_printed() -> None:
    (printed,) = (block for block in blocks(task(RULE)) if block.startswith("[["))
    (entry,) = tomllib.loads(printed)["refused"]
    rules = tomllib.loads((ROOT / "megatron_laer" / "rules.toml").read_text(encoding="utf-8"))
    assert entry in rules["refused"]
