"""This file mends what Megatron's wheel lacks on every device; for the CPU alone see `cpu.py`."""

from pathlib import Path


def mend_dataset_helper() -> None:
    """Keep Megatron from building its dataset helper where the wheel brings it built.

    `pretrain()` runs `make` for it; the wheel has the compiled helper and no Makefile, so the run
    would end there. A source checkout, which has the Makefile, is left alone.
    """
    from megatron.core.datasets import utils

    folder = Path(utils.__file__).parent
    if not (folder / "Makefile").exists() and any(folder.glob("helpers_cpp*.so")):
        utils.compile_helpers = _already_compiled


def _already_compiled() -> None:
    return None
