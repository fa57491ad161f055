"""Fixes for gaps in Megatron's wheel, needed on every device."""

import functools
import os
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def mend_dataset_helper() -> None:
    """Keep Megatron from building its dataset helper if its wheel has it compiled.

    `pretrain()` runs `make` for it; the wheel has no Makefile, so the run would end there. In a
    source checkout, which has the Makefile, check the built file instead.
    """
    from megatron.core.datasets import utils

    folder = Path(utils.__file__).parent
    if (folder / "Makefile").exists():
        utils.compile_helpers = functools.partial(_compile, utils.compile_helpers, folder)
    elif any(folder.glob("helpers_cpp*.so")):
        utils.compile_helpers = _already_compiled


def _already_compiled() -> None:
    return None


def _compile(compile_helpers: Callable[[], None], folder: Path) -> None:
    """Build the helper; raise ImportError if it was built for another Python."""
    compile_helpers()
    if any((folder / f"helpers_cpp{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return
    built = ", ".join(sorted(path.name for path in folder.glob("helpers_cpp*.so"))) or "nothing"
    first = os.pathsep.join(
        dict.fromkeys(str(Path(base) / "bin") for base in (sys.prefix, sys.base_prefix))
    )
    raise ImportError(
        f"Megatron's dataset helper in {folder}: {built} was built, and this Python imports "
        f"helpers_cpp{EXTENSION_SUFFIXES[0]}; the PATH has python3-config of another Python first: "
        f'export PATH="{first}{os.pathsep}$PATH"'
    )
