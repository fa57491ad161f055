"""An installed wheel, made of the sdist, inside and outside a checkout, with every entry point.

The environment of the tests itself has an editable package. A checkout is a copy of this one.
Nothing is downloaded: environments see the test environment's packages except this one. They record
the package's files that each process imports.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import processes
from tests.distributed.test_documented_commands import commands_of
from tests.traces import write_recording
from tests.unit.shell_scripts import fake_python

_ROOT = Path(__file__).resolve().parents[2]
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
_OFFLINE = ["--no-index", "--no-build-isolation"]
_PKG_INFO = re.compile("[^/]+/PKG-INFO")

# Read at start-up in every environment that is made here.
TELLING = """
import atexit, json, os, sys

@atexit.register
def tell():
    package = sys.modules.get("megatron_laer")
    if package is not None and "IMPORTED" in os.environ:
        core = sys.modules.get("megatron_laer.planner._native")
        with open(os.environ["IMPORTED"], "a") as file:
            print(json.dumps([package.__file__, core and core.__file__]), file=file)
"""


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    @property
    def package(self) -> Path:
        return self.packages / "megatron_laer"

    def install(self, wheel: Path) -> None:
        succeed([*_PIP, "--python", self.python, "install", *_OFFLINE, wheel])


def run(
    command: list[Any], cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run on the CPU without paths to this checkout and without a launcher's variables."""
    dropped = ("PYTHONPATH", "SLURM_", "OMPI_", "WORLD_SIZE", "RANK", "LOCAL_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    # Keep another release of Megatron, if these tests run with one.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in paths if path and not (Path(path) / "megatron_laer").exists()]
    if others:
        kept["PYTHONPATH"] = os.pathsep.join(others)
    kept |= {"MEGATRON_LAER_DEVICE": "cpu", "PYTHONWARNINGS": "ignore"}
    return processes.run([str(word) for word in command], 900.0, env=kept | environment, cwd=cwd)


def succeed(command: list[Any], cwd: Path | None = None, **environment: str) -> str:
    result = run(command, cwd, **environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("installs").resolve()


@pytest.fixture(scope="module")
def dependencies(folder: Path) -> Path:
    links = folder / "dependencies"
    links.mkdir()
    for entry in map(Path, sys.path):
        if entry.name not in ("site-packages", "dist-packages") or not entry.is_dir():
            continue
        for package in entry.iterdir():
            ours = "megatron_laer" in package.name
            if not ours and package.suffix != ".pth" and not (links / package.name).exists():
                (links / package.name).symlink_to(package)
    return links


def new_environment(target: Path, dependencies: Path) -> Environment:
    made = Environment(target)
    succeed([sys.executable, "-m", "venv", "--without-pip", target])
    (made.packages / "dependencies.pth").write_text(f"{dependencies}\nimport telling\n")
    (made.packages / "telling.py").write_text(TELLING)
    return made


def new_checkout(target: Path) -> Path:
    ignored = (_ROOT / ".gitignore").read_text().split()
    patterns = shutil.ignore_patterns(".git", *(line.rstrip("/") for line in ignored))
    shutil.copytree(_ROOT, target, ignore=patterns)
    assert not list(target.rglob("*.so"))
    return target


@pytest.fixture(scope="module")
def sdist(folder: Path) -> Path:
    checkout = new_checkout(folder / "checkout-sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    succeed([sys.executable, "-c", build, folder], cwd=checkout)
    (built,) = folder.glob("megatron_laer-*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, folder: Path) -> Path:
    """Make the wheel of the sdist, as pip does; a checkout's is made of the same files."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    succeed([*_PIP, "wheel", "--no-deps", *_OFFLINE, "--wheel-dir", folder, unpacked])
    (built,) = folder.glob("megatron_laer-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(folder: Path, dependencies: Path, wheel: Path) -> Environment:
    environment = new_environment(folder / "environment", dependencies)
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def checkout(folder: Path) -> Path:
    return new_checkout(folder / "checkout-next-to-wheel")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "group-0.trace"
    write_recording(path, np.tile([1, 2], (2, 1, 1, 2, 1)))
    return path


def imported(file: Path) -> list[tuple[Path, Path | None]]:
    """Return the package's folder and core for every process that imported the package."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [(Path(package).parent, core and Path(core)) for package, core in lines]


@pytest.mark.parametrize(
    ("way_in", "cwd", "package"),
    [
        ("python pretrain_gpt.py", "checkout", "checkout"),
        ("python {checkout}/pretrain_gpt.py", "folder", "checkout"),
        ("python {alone}/pretrain_gpt.py", "folder", "installed"),
        # `-m` finds the package in the current folder first.
        ("python -m megatron_laer", "checkout", "checkout"),
        ("megatron-laer", "folder", "installed"),
    ],
)
def test_every_way_in_finds_its_package_and_the_installed_core(
    installed: Environment,
    checkout: Path,
    way_in: str,
    cwd: str,
    package: str,
    tmp_path: Path,
    trace: Path,
) -> None:
    alone, log = tmp_path / "alone", tmp_path / "imported"
    alone.mkdir()
    shutil.copy(_ROOT / "pretrain_gpt.py", alone)
    first, *rest = way_in.format(checkout=checkout, alone=alone).split()
    start: list[Any] = [installed.folder / "bin" / first, *rest]
    folder = checkout if cwd == "checkout" else tmp_path
    if "pretrain_gpt" in way_in:
        result = run([*start, "--expert-parallel-mode", "none"], folder, IMPORTED=str(log))
        assert result.returncode == 2, result.stderr
        assert "argument --expert-parallel-mode: invalid choice: 'none'" in result.stderr
    else:
        flags = succeed([*start, "flags", "tiny-moe"], folder, IMPORTED=str(log))
        assert {"--num-experts", "--moe-router-topk"} <= {*shlex.split(flags)}
        plan = ["plan", trace, "--ranks", "2", "--capacity", "2"]
        assert "greedy" in succeed([*start, *plan], folder, IMPORTED=str(log))
    expected = installed.package if package == "installed" else checkout / "megatron_laer"
    found = imported(log)
    assert {of for of, _ in found} == {expected}
    core = found[-1][1]
    assert core is not None and core.parent == installed.package / "planner"


def test_the_readmes_commands_train(installed: Environment, checkout: Path, tmp_path: Path) -> None:
    """Use a plain installation, started at the top of the checkout."""
    start, log = f'exec {shlex.quote(str(installed.python))} "$@"', tmp_path / "imported"
    launch = start.replace('"$@"', '-m torch.distributed.run --standalone "$@"')
    for name, body in (("pip", "true"), ("python", start), ("torchrun", launch)):
        fake_python(tmp_path, name, body)
    path = f"{tmp_path}:{os.environ['PATH']}"
    printed = "".join(
        succeed([*interpreter, text], checkout, IMPORTED=str(log), PATH=path, OMP_NUM_THREADS="1")
        for interpreter, text in commands_of(_ROOT / "README.md")
    )
    assert "fsep_load_imbalance" in printed
    core = installed.package / "planner"
    assert {(package, found and found.parent) for package, found in imported(log)} >= {
        (checkout / "megatron_laer", core)
    }


def test_doctor_knows_what_an_installed_package_needs(
    installed: Environment, tmp_path: Path
) -> None:
    (tmp_path / "psutil.py").write_text("__version__ = '1.0'")
    command = [installed.folder / "bin" / "megatron-laer", "doctor"]
    result = run(command, tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    rows = result.stdout.splitlines()
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    needed = [re.split("[^a-z-]", line)[0] for line in project["dependencies"]]
    assert {*needed} <= {row.split()[0] for row in rows if row}
    assert any(str(installed.package) in row for row in rows)
    # The allowed ranges come from its metadata.
    assert any(row.startswith("missing or unsupported: ") and "psutil" in row for row in rows)
    assert "pip install 'psutil>=" in result.stdout


def test_a_checkout_without_a_core_of_its_sources_says_what_to_install(
    dependencies: Path, wheel: Path, tmp_path: Path, trace: Path
) -> None:
    environment = new_environment(tmp_path / "environment", dependencies)
    checkout = new_checkout(tmp_path.resolve() / "checkout")
    planner = checkout / "megatron_laer" / "planner"
    plan = ["-m", "megatron_laer", "plan", trace, "--ranks", "2", "--capacity", "2"]

    def refused(words: list[Any], cwd: Path = checkout, path: str = "") -> str:
        result = run([environment.python, *words], cwd, PYTHONPATH=path)
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        return line

    install = shlex.join([str(environment.python), "-m", "pip", "install", "-e", str(checkout)])
    script = [checkout / "pretrain_gpt.py", "--help"]
    for cwd, path in ((checkout, ""), (tmp_path, str(checkout))):
        for words, name in (script, "pretrain_gpt.py"), (plan, "python -m megatron_laer plan"):
            line = refused(words, cwd, path)
            assert line.startswith(
                f"{name}: no native core fits the sources in {checkout}/megatron_laer: "
            )
            assert line.endswith(f"; run {install}")

    stale = planner / "_native.py"
    stale.write_text("sources = 'of another day'\n")
    assert f": {stale} was built from other sources; run " in refused(plan)
    environment.install(wheel)
    succeed([environment.python, *plan], checkout)

    source = planner / "native" / "flow.cpp"
    source.write_text(source.read_text() + "// edited\n")
    line = refused(plan)
    assert line.count("was built from other sources") == 2
    assert str(environment.packages) in line


def test_the_wheel_has_what_type_checkers_and_users_need_and_no_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name) for name in names if name.endswith("/METADATA"))
    assert {"megatron_laer/py.typed", "megatron_laer/planner/_native.pyi"} <= {*names}
    assert not [name for name in names if name.endswith((".cpp", ".hpp"))]
    page = {
        str(file.relative_to(_ROOT)) for file in _ROOT.glob("megatron_laer/tools/report/page/*")
    }
    assert page
    assert page <= {*names}
    yaml = {f"megatron_laer/{file.relative_to(_ROOT)}" for file in _ROOT.glob("configs/*/*.yaml")}
    assert yaml
    assert yaml <= {*names}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megatron_laer"}
    assert metadata.count(b"\nProject-URL: ") >= 2


def test_the_sdist_has_the_whole_checkout_and_nothing_built(sdist: Path, tmp_path: Path) -> None:
    checkout = new_checkout(tmp_path / "checkout")
    files = [file for file in checkout.rglob("*") if file.is_file()]
    with tarfile.open(sdist) as archive:
        members = {
            member.name.partition("/")[2]: member.mode & 0o100
            for member in archive.getmembers()
            if member.isfile()
        }
        (metadata,) = (
            archive.extractfile(name) for name in archive.getnames() if _PKG_INFO.fullmatch(name)
        )
        assert metadata is not None
        assert metadata.read().count(b"\nProject-URL: ") >= 2
    expected = {str(file.relative_to(checkout)): file.stat().st_mode & 0o100 for file in files}
    assert {"pretrain_gpt.py", "constraints.txt", "scripts/test.sh", ".ci/run"} <= {*expected}
    assert {name: mode for name, mode in members.items() if name in expected} == expected
    others = {name for name in {*members} - {*expected} if "egg-info" not in name}
    assert others == {"PKG-INFO", "setup.cfg"}
