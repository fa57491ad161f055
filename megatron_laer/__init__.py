"""This package runs the experts of Megatron-LM's MoE layers with Fully Sharded Expert Parallel.

    import megatron_laer
    megatron_laer.enable(megatron_laer.FSEPConfig(capacity=4))

turns it on for a script of one's own; `python -m megatron_laer train SCRIPT -- ARGS` does it for an
unmodified Megatron script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_laer.config import FSEPConfig

if TYPE_CHECKING:
    from megatron_laer.plugin import disable, enable, training_step
    from megatron_laer.session import get_fsep_group

__version__ = "0.1.0"

__all__ = ["FSEPConfig", "disable", "enable", "get_fsep_group", "training_step"]

_LAZY = {
    "enable": "megatron_laer.plugin",
    "disable": "megatron_laer.plugin",
    "get_fsep_group": "megatron_laer.session",
    "training_step": "megatron_laer.plugin",
}


def __getattr__(name: str) -> Any:
    # Torch and Megatron must not be imported before the CPU platform could replace CUDA.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
