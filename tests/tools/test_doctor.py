"""`doctor` with sound installations, and with each part missing, broken or out of range.

Hidden and faked modules also apply to the processes that `doctor` starts. Each run starts some
fifteen of those, so few of these tests are in the quick set.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_laer.environment import CONNECTIONS
from megatron_laer.releases import NUMBERS, SUPPORTED, TESTED, release_after
from tests.processes import python_path

_ROOT = Path(__file__).resolve().parents[2]
_ROW = re.compile(r"(\S.*?) {2,}(.*?) {2,}((?:ok|optional|missing|unsupported)(?::.*)?)")

# Read at start-up: names of modules that this process must not find.
HIDING = """
    import os, sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in os.environ["HIDDEN"].split():
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hidden())
"""


TORCH = """
    import types
    __version__ = "{version}"
    version = types.SimpleNamespace(cuda="13.2")
    distributed = types.SimpleNamespace(
        is_available=lambda: True, is_gloo_available=lambda: True, is_nccl_available=lambda: {nccl}
    )
    card = types.SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    cuda = types.SimpleNamespace(
        is_available=lambda: {cards} > 0,
        device_count=lambda: {cards},
        get_device_properties=lambda _: card,
        nccl=types.SimpleNamespace(version=lambda: (2, 30, 7)),
        init=lambda: None,
    )
"""


def fake_torch(version: str = "2.15.0", cards: int = 0, nccl: bool = True) -> dict[str, str]:
    return {"torch/__init__.py": TORCH.format(version=version, cards=cards, nccl=nccl)}


def fake_megatron(version: str = TESTED[-1], helper: str = "helpers_cpp.so") -> dict[str, str]:
    return {
        "megatron/core/__init__.py": "",
        "megatron/core/package_info.py": f"__version__ = {version!r}",
        "megatron/core/datasets/__init__.py": "",
        f"megatron/core/datasets/{helper}": "",
    }


@dataclass(frozen=True)
class Examined:
    status: int
    rows: dict[str, tuple[str, str]]
    first_line: str
    stderr: str

    def verdict(self, name: str) -> str:
        return self.rows[name][1]


Doctor = Callable[..., Examined]


@pytest.fixture
def doctor(tmp_path):
    """Run `doctor` with `fakes` (code by file) ahead of installed modules, and `hidden` modules."""

    def run(
        fakes: dict[str, str] | None = None,
        hidden: str = "",
        path: str | None = None,
        words: tuple[str, ...] = (),
        **environment: str,
    ) -> Examined:
        # Each run has its own folder: a rewritten file of equal length within a second would reuse
        # the byte code of its predecessor.
        folder = Path(tempfile.mkdtemp(prefix="fakes-", dir=tmp_path))
        for file, code in ({"sitecustomize.py": HIDING} | (fakes or {})).items():
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(code))
        kept = {k: v for k, v in os.environ.items() if not _is_the_launchers(k)}
        result = subprocess.run(
            [sys.executable, "-m", "megatron_laer", "doctor", *words],
            env=kept
            | {"PYTHONPATH": f"{folder}:{path or python_path()}", "HIDDEN": hidden}
            | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        lines = result.stdout.splitlines()
        found = [match.groups() for line in lines if (match := _ROW.fullmatch(line))]
        rows = {name: (state, verdict) for name, state, verdict in found}
        assert len(found) == max(0, len(lines) - 2), result.stdout
        return Examined(result.returncode, rows, lines[0] if lines else "", result.stderr)

    return run


def _is_the_launchers(name: str) -> bool:
    ours = {"WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "MEGATRON_LAER_DEVICE", CONNECTIONS}
    return name in ours or name.startswith(("SLURM_", "OMPI_"))


@pytest.mark.distributed
def test_with_everything_there_every_row_says_so(doctor):
    examined = doctor()
    assert examined.status == 0, examined
    assert examined.first_line == "everything that training needs is there"
    assert {"native core", "torch", "megatron-core", "plugin", "CUDA", "launcher"} <= {
        *examined.rows
    }
    assert re.match(r"finds all \d+ places", examined.rows["plugin"][0])
    ours = examined.rows["megatron_laer"][0]
    assert str(_ROOT / "megatron_laer") in ours
    assert (", commit " in ours) == (_ROOT / ".git").exists()
    # The repository's commit is not Megatron's.
    assert "+" not in examined.rows["megatron-core"][0].split(",")[0]
    assert examined.rows["native core"][0].endswith(".so")


REQUIRED = {
    "megatron-core": f"megatron-core{SUPPORTED}",
    "torch": "torch>=2.6",
    "numpy": "numpy>=1.26",
    "packaging": "packaging>=24.2",
    "psutil": "psutil>=5.9",
    "pyyaml": "pyyaml>=6.0",
    "tqdm": "tqdm>=4.66",
}


def missing(name: str) -> tuple[str, str]:
    return "none", f"missing: {sys.executable} -m pip install '{REQUIRED[name]}'"


def test_it_runs_where_nothing_at_all_is_installed(doctor):
    hidden = "torch megatron numpy packaging psutil yaml tqdm apex transformer_engine"
    examined = doctor(hidden=hidden)
    assert examined.status == 1
    assert {name: examined.rows[name] for name in REQUIRED} == {n: missing(n) for n in REQUIRED}
    assert examined.first_line == f"missing or unsupported: {', '.join(REQUIRED)}"
    assert examined.verdict("Python") == "ok"
    assert examined.stderr == ""


@pytest.mark.distributed
def test_imports_that_fail_in_any_way_are_rows(doctor):
    broken = {
        "psutil/__init__.py": "import os; os.abort()",
        "tqdm/__init__.py": "import colour_of_bars",
        "yaml/__init__.py": "raise RuntimeError('first\\nand second')",
        "numpy/__init__.py": "raise ImportError('no libfoo.so')",
    }
    examined = doctor(fake_torch() | fake_megatron() | broken)
    assert examined.status == 1
    assert {name: examined.rows[name][0] for name in ("psutil", "tqdm", "pyyaml", "numpy")} == {
        "psutil": "its import ended Python with signal 6",
        "tqdm": "does not start",
        "pyyaml": "RuntimeError: first and second",
        "numpy": "no libfoo.so",
    }
    assert examined.verdict("tqdm") == "missing: install colour_of_bars, which it imports"
    assert examined.verdict("psutil").startswith("missing: install it again: ")
    assert examined.first_line == "missing or unsupported: numpy, psutil, pyyaml, tqdm"


@pytest.mark.distributed
@pytest.mark.parametrize("megatron", ["0.17.1", f"{release_after(NUMBERS[-1])}.0"])
def test_versions_out_of_range_are_unsupported(doctor, megatron):
    fakes = fake_torch("2.5.1") | fake_megatron(megatron)
    # What an import prints is not taken for its answer.
    others = {
        "yaml/__init__.py": "__version__ = '5.4'",
        "psutil/__init__.py": "__version__ = '6.1'\nprint('{}')",
    }
    examined = doctor(fakes | others)
    assert examined.status == 1
    pip = f"unsupported: {sys.executable} -m pip install"
    assert examined.rows["torch"] == ("2.5.1", f"{pip} 'torch>=2.6'")
    assert examined.rows["pyyaml"] == ("5.4", f"{pip} 'pyyaml>=6.0'")
    assert examined.rows["psutil"] == ("6.1", "ok")
    assert examined.rows["megatron-core"][0].startswith(f"{megatron}, ")
    assert examined.verdict("megatron-core").startswith("unsupported: ")
    assert examined.first_line == "missing or unsupported: megatron-core, torch, pyyaml"


@pytest.mark.distributed
def test_a_checkout_without_a_core_names_the_command_that_builds_it(doctor, tmp_path):
    checkout = tmp_path / "checkout"
    no_core = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(_ROOT / "megatron_laer", checkout / "megatron_laer", ignore=no_core)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(_ROOT / name, checkout / name)
    examined = doctor(fake_torch() | fake_megatron(), path=str(checkout))
    assert examined.status == 1
    assert examined.rows["native core"][0] == "none"
    assert f"-m pip install -e {checkout}" in examined.verdict("native core")
    assert examined.first_line == "missing or unsupported: native core"


@pytest.mark.distributed
def test_gpus_are_listed_and_what_they_could_use_is_optional(doctor):
    fakes = fake_torch(cards=2) | fake_megatron(f"{NUMBERS[-1]}.99")
    examined = doctor(fakes, hidden="apex transformer_engine")
    assert examined.rows["cards"] == ("2 x H100, 80 GiB, sm_90", "ok")
    assert examined.rows["NCCL"] == ("2.30.7", "ok")
    assert examined.verdict("CUDA") == "ok"
    te = examined.verdict("transformer-engine")
    assert te.startswith("optional: Megatron's default on a GPU")
    assert "--no-gradient-accumulation-fusion" in examined.verdict("apex")
    assert examined.rows["CUDA_DEVICE_MAX_CONNECTIONS"] == ("not set", "ok")
    # A release that was not tested but is supported is reported as such.
    assert examined.verdict("megatron-core").startswith(f"ok: supported; tested were {TESTED[0]}, ")


@pytest.mark.distributed
def test_gpus_need_nccl_and_a_newer_torch(doctor):
    examined = doctor(fake_torch("2.7.1", cards=2, nccl=False) | fake_megatron())
    assert examined.rows["torch"][0] == "2.7.1"
    assert examined.verdict("torch").startswith("unsupported: torch 2.7.1 on a GPU: before torch 2")
    assert examined.rows["NCCL"] == ("none", "missing: install a torch with NCCL")
    assert examined.status == 1
    assert examined.first_line == "missing or unsupported: torch, NCCL"


@pytest.mark.distributed
def test_variables_that_are_wrong_are_quoted(doctor):
    wrong = {"MEGATRON_LAER_DEVICE": "tpu", "LOCAL_WORLD_SIZE": "a\nb", "WORLD_SIZE": "many"}
    examined = doctor(fake_torch("2.7.1") | fake_megatron(), **wrong)
    assert examined.status == 1
    assert examined.verdict("torch") == "ok"  # without a GPU
    assert "MEGATRON_LAER_DEVICE='tpu' names no device" in examined.verdict("CUDA")
    assert r"LOCAL_WORLD_SIZE='a\nb': must be an integer" in examined.verdict("node size")
    assert examined.rows["launcher"][0] == "torchrun: no rank of 'many'"
    assert "WORLD_SIZE='many': must be an integer" in examined.verdict("launcher")
    assert examined.first_line == "missing or unsupported: CUDA, launcher, node size"
