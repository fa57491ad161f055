"""Dockerfiles are sound, as far as this shows without a build."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.dockerfiles import DOCKERFILES, instructions, moved
from tests.documents import ROOT
from tests.unit.shell_scripts import fake_python

# Options of a mount from the repository rather than from a stage or a cache.
_OF_SOURCES = {"type", "source", "target"}
each = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


@each
def test_what_is_copied_is_in_the_repository_and_enough_to_build(path: Path) -> None:
    copied: set[str] = set()
    for instruction in instructions(path):
        if instruction.name == "COPY" and "from" not in instruction.options:
            *sources, _ = instruction.text.split()
            copied |= {*sources}
        copied |= {mount["source"] for mount in instruction.mounts if mount.keys() == _OF_SOURCES}
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []
    setup = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    needed = set(re.findall(r'"(README\.md|LICENSE|configs|megatron_laer)\b', setup))
    assert {"pyproject.toml", "setup.py", "pretrain_gpt.py", *needed} <= copied


@each
def test_nothing_only_needed_to_install_stays_and_shellcheck_finds_nothing(path: Path) -> None:
    for instruction in instructions(path):
        words = shlex.split(instruction.text) if instruction.name == "RUN" else []
        if "apt-get" in words:
            assert "--no-install-recommends" in words
            assert words[-3:] == ["rm", "-rf", "/var/lib/apt/lists/*"]
        if all(mount["type"] != "cache" for mount in instruction.mounts):
            assert words.count("pip") == words.count("--no-cache-dir")
    for instruction in instructions(path):
        if instruction.name == "RUN":
            shellcheck = [Path(sys.executable).with_name("shellcheck"), "--shell=bash"]
            command = [*shellcheck, "--exclude=SC2154", "-"]
            subprocess.run(command, input=instruction.text, text=True, check=True)


@each
def test_an_image_trains_without_roots_rights_and_has_tried_what_it_needs(path: Path) -> None:
    found = instructions(path)
    names = [instruction.name for instruction in found]
    assert [instruction.text for instruction in found if instruction.name == "USER"] == ["laer"]
    assert names[names.index("USER") :] == ["USER", "WORKDIR", "RUN", "CMD"]
    trial, command = found[-2].text, found[-1].text
    assert "megatron-laer doctor" in trial and "check-recipe" in trial
    assert json.loads(command) == ["megatron-laer", "doctor"]


def wheel(folder: Path, name: str, version: str, needs: Sequence[str] = ()) -> None:
    info = f"{name}-{version}.dist-info"
    about = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    tags = ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *about, ""]))
        file.writestr(f"{info}/WHEEL", "\n".join([*tags, ""]))
        file.writestr(f"{info}/RECORD", "")


# As in an image: torch is no release, and a constraint pins a version too old for Megatron.
_IN_IMAGE = {
    "torch": "2.10.0a0+b4e4ee81d3.nv25.12",
    "numpy": "2.1.0",
    "packaging": "23.2",
    "psutil": "7.0.0",
    "pyyaml": "6.0.2",
    "tqdm": "4.67.1",
}


def test_on_an_image_with_constraints_only_what_is_too_old_is_replaced(tmp_path: Path) -> None:
    """Run the real commands and pip's resolution on empty packages."""
    index, etc = tmp_path / "index", tmp_path / "etc" / "pip"
    for folder in (index, etc, tmp_path / "bin"):
        folder.mkdir(parents=True)
    venv.create(tmp_path / "image", with_pip=False)
    python = tmp_path / "image" / "bin" / "python3"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    for name, version in _IN_IMAGE.items():
        wheel(index, name, version)
        wheel(index, name, "99.0")
    wheel(index, "megatron_core", "0.19.2", ["torch>=2.6.0", "numpy", "packaging>=24.2"])
    told = ("PIP_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(told)} | {
        "PATH": f"{tmp_path / 'bin'}:{python.parent}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    pinned = [f"{name}=={version}" for name, version in _IN_IMAGE.items()]
    subprocess.run([*pip, "install", "--quiet", *pinned], env=environment, check=True)
    (etc / "constraint.txt").write_text("\n".join(pinned))
    environment["PIP_CONSTRAINT"] = str(etc / "constraint.txt")
    fake_python(tmp_path / "bin", "pip", f'exec {shlex.join(pip)} "$@"')

    (ngc,) = (path for path in DOCKERFILES if path.name == "ngc.Dockerfile")
    last = [i.text for i in instructions(ngc) if (i.name, i.stage) == ("RUN", 2)]
    here = {"/etc/pip": etc, "/needs": ROOT, "/tmp": tmp_path}
    for text in last[: 1 + next(i for i, text in enumerate(last) if "--requirement" in text)]:
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", moved(text, here)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    listed = subprocess.run(
        [*pip, "list", "--format", "freeze"], env=environment, capture_output=True, text=True
    )
    found = dict(line.lower().split("==") for line in listed.stdout.splitlines())
    assert found == _IN_IMAGE | {"packaging": "99.0", "megatron_core": "0.19.2"}
