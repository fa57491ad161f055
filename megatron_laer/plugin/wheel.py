"""Fix for a gap in Megatron's wheel, needed on every device."""

from pathlib import Path


def mend_dataset_helper() -> None:
    """Keep Megatron from building its dataset helper if its wheel has it compiled.

    `pretrain()` runs `make` for it; the wheel has no Makefile, so the run would end there. A source
    checkout builds it.
    """
    from megatron.core.datasets import utils

    folder = Path(utils.__file__).parent
    if not (folder / "Makefile").exists() and any(folder.glob("helpers_cpp*.so")):
        utils.compile_helpers = _already_compiled


def _already_compiled() -> None:
    return None
