"""Dockerfiles are sound as far as one can tell without building them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dockerfiles import DOCKERFILES, instructions
from tests.documents import ROOT

_KNOWN = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "SHELL", "WORKDIR"}
_IDS = [path.name for path in DOCKERFILES]
each = pytest.mark.parametrize("path", DOCKERFILES, ids=_IDS)


@each
def test_instructions_are_known_and_stages_begin_with_a_base(path: Path) -> None:
    found = instructions(path)
    assert {instruction.name for instruction in found} <= _KNOWN
    assert {i.name for i in found if i.stage == 0} == {"ARG"}
    assert {i.name for i in found if i.stage == max(i.stage for i in found)} >= {"RUN", "CMD"}
    stages = [i.text.partition(" AS ")[2] for i in found if i.name == "FROM"]
    for instruction in found:
        if source := instruction.options.get("from"):
            assert source in stages[: instruction.stage - 1]


@each
def test_arguments_are_declared_before_they_are_used(path: Path) -> None:
    declared: set[tuple[int, str]] = set()
    for instruction in instructions(path):
        if instruction.name == "ARG":
            declared.add((instruction.stage, instruction.text.partition("=")[0]))
        # What is declared before the first FROM is seen by FROM alone.
        scope = 0 if instruction.name == "FROM" else instruction.stage
        for name in re.findall(r"\$\{?([A-Z_]+)", instruction.text):
            assert (scope, name) in declared, name


@each
def test_a_base_has_a_version_that_is_chosen(path: Path) -> None:
    for instruction in instructions(path):
        if instruction.name == "FROM":
            base = instruction.text.partition(" AS ")[0]
            assert re.fullmatch(r"\$\{IMAGE\}|python:\$\{PYTHON_VERSION\}-slim", base), base


@each
def test_what_is_copied_is_in_the_repository_and_enough_to_build(path: Path) -> None:
    copied: set[str] = set()
    for instruction in instructions(path):
        if instruction.name == "COPY" and "from" not in instruction.options:
            *sources, _ = instruction.text.split()
            copied |= {*sources}
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []
    setup = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    needed = set(re.findall(r'"(README\.md|LICENSE|configs|megatron_laer)\b', setup))
    assert {"pyproject.toml", "setup.py", "pretrain_gpt.py", *needed} <= copied


@each
def test_shellcheck_finds_nothing_in_what_is_run(path: Path) -> None:
    for instruction in instructions(path):
        if instruction.name == "RUN":
            result = subprocess.run(
                [
                    Path(sys.executable).with_name("shellcheck"),
                    "--shell=bash",
                    "--exclude=SC2154",
                    "-",
                ],
                input=instruction.text,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, result.stdout


@each
def test_nothing_that_was_only_needed_to_install_stays(path: Path) -> None:
    for instruction in instructions(path):
        words = shlex.split(instruction.text) if instruction.name == "RUN" else []
        if "apt-get" in words:
            assert "--no-install-recommends" in words
            assert words[-3:] == ["rm", "-rf", "/var/lib/apt/lists/*"]
        assert words.count("pip") == words.count("--no-cache-dir")


@each
def test_no_failure_of_a_pipeline_is_lost(path: Path) -> None:
    shells = [i.stage for i in instructions(path) if i.name == "SHELL" and "pipefail" in i.text]
    piped = [i.stage for i in instructions(path) if re.search(r"[^|]\|[^|]", i.text)]
    assert piped and {*piped} <= {*shells}


@each
def test_an_image_is_tried_before_it_is_done(path: Path) -> None:
    runs = [i for i in instructions(path) if i.name == "RUN"]
    assert "check-recipe" in runs[-1].text
    (command,) = (i.text for i in instructions(path) if i.name == "CMD")
    assert json.loads(command) == ["megatron-laer", "doctor"]


def test_the_torch_of_a_base_that_has_one_stays() -> None:
    (ngc,) = (path for path in DOCKERFILES if path.name == "ngc.Dockerfile")
    (install,) = (i.text for i in instructions(ngc) if "pip install" in i.text)
    # Constraints that the image has set hold as well: nothing unsets PIP_CONSTRAINT.
    assert "torch==" in install and "--constraint" in install and "PIP_CONSTRAINT" not in install


def test_lines_are_read_as_docker_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(
        "# a\nARG X=1\nFROM a:${X} AS b\n"
        "RUN --mount=type=bind,from=b \\\n    c \\\n    # d\n    && e\n"
    )
    arg, base, run = instructions(path)
    assert (arg.name, arg.stage, base.stage, run.stage) == ("ARG", 0, 1, 1)
    assert run.options == {"mount": "type=bind,from=b"}
    assert run.text.split() == ["c", "\\", "&&", "e"]
    path.write_text("FROM a\nrun b\n")
    with pytest.raises(ValueError, match="'run b' begins with no instruction"):
        instructions(path)


@each
def test_the_page_has_the_commands_of_the_files_heads(path: Path) -> None:
    page = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    assert f"docker build --file scripts/docker/{path.name} " in page
    assert f"docker build --file scripts/docker/{path.name} " in path.read_text(encoding="utf-8")
