"""Needs of Triton, which compiles FSEP's kernels on each node, at their first launch."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

NO_TRITON = (
    "Triton is not installed: torch replaces FSEP's kernels, with a launch "
    "for each replica, and sums in no fixed order; install triton, which PyTorch for CUDA brings"
)


def is_installed() -> bool:
    return find_spec("triton") is not None


def problem(environment: Mapping[str, str]) -> str | None:
    """Return the reason why Triton cannot compile here, with a remedy; None if it can."""
    given = environment.get("CC")
    compilers = ("gcc", "clang") if given is None else (given,)
    path = environment.get("PATH")
    if not any(shutil.which(name, path=path) for name in compilers):
        return (
            "Triton compiles kernels at their first launch, and finds no C compiler "
            f"({' or '.join(compilers)}); install gcc on every node, or set CC"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"])
    if not (headers / "Python.h").is_file():
        return (
            f"Triton compiles kernels at their first launch, and {headers} has no Python.h; "
            "install Python's headers (python3-dev) on every node"
        )
    return None
