"""`native`: the compiled core, next to this file or from an installed package.

Python in a checkout imports the checkout's `megatron_laer`, and only an editable installation puts
a core there. Otherwise the installed package's core is used, if it was built from the checkout's
C++ sources. Nothing is built here.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_laer.planner.native_sources import digest

__all__ = ["load", "native"]

_NAME = "megatron_laer.planner._native"
_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE / "native"


def load() -> ModuleType:
    """Import the first core that fits, as `megatron_laer.planner._native`.

    Raises:
        ImportError: no core fits; one line with the candidates and the remedy.
    """
    # An installed package has a core and no sources.
    wanted = digest(_SOURCES) if _SOURCES.is_dir() else None
    folders = [_HERE, *(Path(entry, "megatron_laer", "planner").resolve() for entry in sys.path)]
    found = []
    for folder in dict.fromkeys(folders):
        spec = PathFinder.find_spec(_NAME, [str(folder)])
        if spec is None or spec.loader is None:
            continue
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            found.append(f"{spec.origin} does not load ({error})")
            continue
        if wanted in (None, getattr(module, "sources", None)):
            sys.modules[_NAME] = module
            return module
        found.append(f"{spec.origin} was built from other sources")
    raise ImportError(_nothing_fits(found))


def _nothing_fits(found: list[str]) -> str:
    root = _HERE.parents[1]
    if (root / "setup.py").is_file():
        way_out = "run " + shlex.join([sys.executable, "-m", "pip", "install", "-e", str(root)])
    else:
        way_out = f"install megatron_laer again, with {sys.executable}"
    state = "; ".join(found) or f"none is in {_HERE} or in an installed megatron_laer"
    return f"no native core fits the sources in {_HERE.parent}: {state}; {way_out}"


if TYPE_CHECKING:
    from megatron_laer.planner import _native as native
else:
    native = load()
