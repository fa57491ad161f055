"""Fully Sharded Expert Parallel (FSEP) for Megatron-LM.

    import megatron_laer
    megatron_laer.enable(megatron_laer.FSEPConfig(capacity=4))

turns it on in a script of your own; `python -m megatron_laer train SCRIPT -- ARGS` does so for an
unmodified Megatron script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_laer.config import FSEPConfig
from megatron_laer.version import __version__

if TYPE_CHECKING:
    from megatron_laer.plugin import disable, enable, training_step
    from megatron_laer.session import announce_routing, get_fsep_group

__all__ = [
    "FSEPConfig",
    "__version__",
    "announce_routing",
    "disable",
    "enable",
    "get_fsep_group",
    "training_step",
]

_LAZY = {
    "enable": "megatron_laer.plugin",
    "disable": "megatron_laer.plugin",
    "announce_routing": "megatron_laer.session",
    "get_fsep_group": "megatron_laer.session",
    "training_step": "megatron_laer.plugin",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `prepare` can replace CUDA before torch and Megatron are imported.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
