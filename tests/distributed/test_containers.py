"""The commands of the plain Dockerfile run here in their order, with pip kept off the network."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.dockerfiles import DOCKERFILES, instructions, moved
from tests.documents import ROOT

_PYTHON = shlex.quote(sys.executable)
_PIP = f"{_PYTHON} -m pip --disable-pip-version-check"
# Replacements of the image's programs: installs go into a folder, and the package's dependencies
# are there already.
_PROGRAMS = {
    "apt-get": 'echo "apt-get $*"',
    "chown": 'echo "chown $*"',
    "useradd": 'echo "useradd $*"',
    "python3": f'exec {_PYTHON} "$@"',
    "pip": f"""\
command=$1 && shift
case "$command $*" in
    wheel*) ;;
    *--requirement*) set -- --dry-run "$@" ;;
    *) set -- --no-deps --target "$SITE" "$@" ;;
esac
exec {_PIP} "$command" --no-index --no-build-isolation "$@"
""",
    "megatron-laer": f'PYTHONPATH=$SITE exec {_PYTHON} -P -m megatron_laer "$@"',
}


@pytest.mark.nightly
def test_the_plain_files_commands_build_and_try_a_wheel(tmp_path: Path) -> None:
    (plain,) = (path for path in DOCKERFILES if path.name == "plain.Dockerfile")
    programs, root = tmp_path / "bin", tmp_path / "root"
    programs.mkdir()
    for name, body in _PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)

    inside = ("/opt", "/source", "/tmp", "/var", "/wheels", "/workspace")
    here = {"/needs": ROOT} | {name: root / name.removeprefix("/") for name in inside}
    (root / "tmp").mkdir(parents=True)

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SITE": str(root / "site"),
        "TORCH_INDEX_URL": "",
        "USER_ID": "1000",
        "MEGATRON_LAER_DEVICE": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    folder, said = root, ""
    for instruction in instructions(plain):
        if instruction.name == "WORKDIR":
            folder = Path(moved(instruction.text, here))
            folder.mkdir(parents=True, exist_ok=True)
        elif instruction.name == "COPY":
            *sources, target = moved(instruction.text, here).split()
            to = folder / target
            for source in sources:
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("*.so", "__pycache__")
                    shutil.copytree(ROOT / source, to, ignore=ignored)
                else:
                    to.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, to)
        elif instruction.name == "RUN":
            command = ["bash", "-o", "pipefail", "-c", moved(instruction.text, here)]
            result = processes.run(command, 1800.0, cwd=folder, env=environment)
            assert result.returncode == 0, f"{instruction.text}\n{result.stdout}{result.stderr}"
            said = result.stdout
    _, _, rest = said.partition("everything that training needs is there\n\n")
    assert rest.startswith("megatron_laer ") and "\nruns; proved by row '" in rest
    assert len(list((root / "wheels").glob("megatron_laer-*.whl"))) == 1
    assert (root / "site" / "megatron_laer" / "configs" / "models" / "tiny-moe.yaml").exists()
