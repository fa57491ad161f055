"""These rows are about this package and those that it needs, whose ranges pyproject.toml has."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import megatron_laer
from megatron_laer.tools.doctor.row import Answer, Row, Verdict

_PACKAGE = Path(megatron_laer.__file__).resolve().parent
# Where a distribution's module is not called like it.
_MODULES = {
    "megatron-core": "megatron.core",
    "pyyaml": "yaml",
    "transformer-engine": "transformer_engine.pytorch",
}
# What training or a command does without them.
_OPTIONAL = {
    "transformer-engine": "Megatron's default on a GPU; without it give --transformer-impl local",
    "apex": "with --transformer-impl local; without it give --no-gradient-accumulation-fusion",
    "emerging-optimizers": "for --optimizer muon and lion",
    "matplotlib": "for the plot of `plan`",
}
_FOR_GPUS = ("transformer-engine", "apex")


@dataclass(frozen=True)
class Requirement:
    """Holds one line of a package's dependencies.

    Attributes:
        name: of the distribution, in lower case.
        text: as pip takes it.
    """

    name: str
    text: str

    @property
    def module(self) -> str:
        """Name the module whose import shows that the package works."""
        return _MODULES.get(self.name, self.name)

    @property
    def install(self) -> str:
        """Return the command that installs it."""
        return shlex.join([sys.executable, "-m", "pip", "install", self.text])

    def allows(self, version: str) -> bool:
        """Tell whether a version is in range; without `packaging`, itself needed, any is."""
        try:
            from packaging.requirements import Requirement as Parsed
        except ImportError:
            return True
        return Parsed(self.text).specifier.contains(version, prereleases=True)


@dataclass(frozen=True)
class Requirements:
    """Holds what pyproject.toml declares.

    Attributes:
        python: the range of Python versions, such as `>=3.12`.
        always: what an installation brings along.
        extras: what an extra adds.
    """

    python: str
    always: tuple[Requirement, ...]
    extras: tuple[Requirement, ...]


def requirements() -> Requirements:
    """Read the requirements of the checkout whose sources run, or else of the installed package."""
    checkout = _PACKAGE.parent / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text())["project"]
        python, always = project["requires-python"], project["dependencies"]
        extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    else:
        metadata = importlib.metadata.metadata("megatron_laer")
        python, lines = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
        always = [line for line in lines if ";" not in line]
        extras = [line.partition(";")[0].strip() for line in lines if ";" in line]
    return Requirements(python, tuple(map(_parsed, always)), tuple(map(_parsed, extras)))


def _parsed(line: str) -> Requirement:
    name = re.match(r"[\w.-]+", line)
    assert name is not None, line
    return Requirement(name[0].lower().replace("_", "-"), line)


def optional(declared: Requirements) -> list[Requirement]:
    """List what is looked for beside what is always needed."""
    ranges = {required.name: required for required in declared.extras}
    return [ranges.get(name, Requirement(name, name)) for name in _OPTIONAL]


def ours() -> Row:
    """Name this package's version, and tell whether another one is installed."""
    every = importlib.metadata.distributions(name="megatron_laer")
    others = {distribution.version for distribution in every} - {megatron_laer.__version__}
    note = f"these files come before the installed {', '.join(sorted(others))}" if others else ""
    return Row("megatron_laer", f"{megatron_laer.__version__}, {_PACKAGE}", note=note)


def native_core(answer: Answer) -> Row:
    """Look for the compiled core of the planner."""
    if "error" in answer:
        return Row("native core", "none", Verdict.MISSING, answer["error"])
    return Row("native core", answer["file"])


def python(supported: str) -> Row:
    """Check the interpreter's version."""
    version = platform.python_version()
    found = f"{version}, {sys.executable}"
    if Requirement("python", f"python{supported}").allows(version):
        return Row("Python", found)
    return Row("Python", found, Verdict.UNSUPPORTED, f"use a Python {supported}")


def needed(required: Requirement, answer: Answer) -> Row:
    """Check a package that training needs."""
    if answer.get("absent"):
        return Row(required.name, "none", Verdict.MISSING, required.install)
    if "lacks" in answer:
        note = f"install {answer['lacks']}, which it imports"
        return Row(required.name, "does not start", Verdict.MISSING, note)
    if "error" in answer:
        note = f"install it again: {required.install}"
        return Row(required.name, answer["error"], Verdict.MISSING, note)
    version, folder = answer["version"], answer.get("folder")
    found = f"{version}, {folder}" if folder else version
    if "unsupported" in answer:
        return Row(required.name, found, Verdict.UNSUPPORTED, answer["unsupported"])
    if not required.allows(version):
        return Row(required.name, found, Verdict.UNSUPPORTED, required.install)
    # The mark of a build follows the plus.
    release = version.partition("+")[0]
    tested = answer.get("tested", [release])
    note = "" if release in tested else f"supported; tested were {', '.join(tested)}"
    return Row(required.name, found, note=note)


def extra(required: Requirement, answer: Answer, on_cuda: bool) -> Row:
    """Check a package that training, or a command, can do without."""
    name, use = required.name, _OPTIONAL[required.name]
    if name in _FOR_GPUS and not on_cuda:
        return Row(name, answer.get("version", "none"), note="not used without a GPU")
    if answer.get("absent"):
        return Row(name, "none", Verdict.OPTIONAL, use)
    if "error" in answer:
        return Row(name, answer["error"], Verdict.OPTIONAL, f"install it again or remove it; {use}")
    if not required.allows(answer["version"]):
        return Row(name, answer["version"], Verdict.OPTIONAL, f"too old: {required.install}")
    return Row(name, answer["version"])


def plugin(answer: Answer) -> Row:
    """Check that the plugin finds in Megatron all that it replaces."""
    if "error" in answer:
        return Row("plugin", "does not start", Verdict.UNSUPPORTED, answer["error"])
    return Row("plugin", f"finds all {answer['places']} places in Megatron")
