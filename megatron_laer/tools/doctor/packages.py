"""Checks of this package and of its dependencies, whose ranges are in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import megatron_laer
from megatron_laer.tools.doctor.check import Answer, Check, Status

_PACKAGE = Path(megatron_laer.__file__).resolve().parent
# Distributions whose modules have other names.
_MODULES = {
    "megatron-core": "megatron.core",
    "pyyaml": "yaml",
    "transformer-engine": "transformer_engine.pytorch",
}
# Packages that are optional for training or for a command, and their use.
_OPTIONAL = {
    "transformer-engine": "Megatron's default on a GPU; without it give --transformer-impl local",
    "apex": "with --transformer-impl local; without it give --no-gradient-accumulation-fusion",
    "emerging-optimizers": "for --optimizer muon and lion",
    "jinja2": "for the page of `report`",
}
_FOR_GPUS = ("transformer-engine", "apex")


@dataclass(frozen=True)
class Requirement:
    """One dependency: its pip requirement, and the distribution's name in lower case."""

    name: str
    text: str

    @property
    def module(self) -> str:
        return _MODULES.get(self.name, self.name)

    @property
    def install(self) -> str:
        return shlex.join([sys.executable, "-m", "pip", "install", self.text])

    def allows(self, version: str) -> bool:
        """Return whether a version is in range; True if `packaging`, itself needed, is missing."""
        try:
            from packaging.requirements import Requirement as Parsed
        except ImportError:
            return True
        return Parsed(self.text).specifier.contains(version, prereleases=True)


def requirements() -> tuple[str, list[Requirement], list[Requirement]]:
    """Return the range of Python versions, the needed packages and the optional ones.

    The source is the checkout whose code runs, or else the installed package.
    """
    checkout = _PACKAGE.parent / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text())["project"]
        python, needed = project["requires-python"], project["dependencies"]
        extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    else:
        metadata = importlib.metadata.metadata("megatron_laer")
        python, lines = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
        needed = [line for line in lines if ";" not in line]
        extras = [line.partition(";")[0].strip() for line in lines if ";" in line]
    ranges = {required.name: required for required in map(_parsed, extras)}
    optional = [ranges.get(name, Requirement(name, name)) for name in _OPTIONAL]
    return python, list(map(_parsed, needed)), optional


def _parsed(line: str) -> Requirement:
    name = re.match(r"[\w.-]+", line)
    assert name is not None, line
    return Requirement(name[0].lower().replace("_", "-"), line)


def ours() -> Check:
    """Return this package's version and commit; note another installed version."""
    every = importlib.metadata.distributions(name="megatron_laer")
    others = {distribution.version for distribution in every} - {megatron_laer.__version__}
    note = f"these files come before the installed {', '.join(sorted(others))}" if others else ""
    commit = _commit(_PACKAGE.parent)
    version = megatron_laer.__version__ + (f", commit {commit}" if commit else "")
    return Check("megatron_laer", f"{version}, {_PACKAGE}", note=note)


def _commit(checkout: Path) -> str:
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def native_core(answer: Answer) -> Check:
    if "error" in answer:
        return Check("native core", "none", Status.MISSING, answer["error"])
    return Check("native core", answer["file"])


def python(supported: str) -> Check:
    version = platform.python_version()
    found = f"{version}, {sys.executable}"
    if Requirement("python", f"python{supported}").allows(version):
        return Check("Python", found)
    return Check("Python", found, Status.UNSUPPORTED, f"use a Python {supported}")


def system() -> Check:
    found = f"{platform.platform()}, {os.cpu_count()} cores"
    if sys.platform == "linux":
        return Check("system", found)
    return Check("system", found, Status.UNSUPPORTED, "use Linux")


def package(required: Requirement, answer: Answer, on_cuda: bool) -> Check:
    """Check a package, which training needs, or which is optional for it or for a command."""
    name, use = required.name, _OPTIONAL.get(required.name)
    lacking, again = Status.MISSING, f"install it again: {required.install}"
    if use is not None:
        lacking, again = Status.OPTIONAL, f"install it again or remove it; {use}"
    if name in _FOR_GPUS and not on_cuda:
        return Check(name, answer.get("version", "none"), note="not used without a GPU")
    if answer.get("absent"):
        return Check(name, "none", lacking, use or required.install)
    if "lacks" in answer:
        note = f"install {answer['lacks']}, which it imports"
        return Check(name, "does not start", lacking, note)
    if "error" in answer:
        return Check(name, answer["error"], lacking, again)
    version, folder = answer["version"], answer.get("folder")
    found = f"{version}, {folder}" if folder else version
    if "unsupported" in answer:
        return Check(name, found, Status.UNSUPPORTED, answer["unsupported"])
    if not required.allows(version):
        status = Status.OPTIONAL if use else Status.UNSUPPORTED
        return Check(name, found, status, required.install)
    # The build's tag follows the plus.
    release = version.partition("+")[0]
    tested = answer.get("tested", [release])
    note = "" if release in tested else f"supported; tested were {', '.join(tested)}"
    return Check(name, found, note=note)


def plugin(answer: Answer) -> Check:
    """Check that Megatron has everything that the plugin replaces."""
    if "error" in answer:
        return Check("plugin", "does not start", Status.UNSUPPORTED, answer["error"])
    return Check("plugin", f"finds all {answer['places']} places in Megatron")
