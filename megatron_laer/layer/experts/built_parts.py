"""Modules and parameters that a layer's experts were built with, to notice later changes."""

from __future__ import annotations

import torch

# Maximum number of foreign modules per message.
_SHOWN = 4

_WAY_OUT = (
    "so adapters such as LoRA cannot be on them; give as targets layers of attention alone, such "
    "as linear_qkv and linear_proj, or leave out --expert-parallel-mode fsep"
)

# Reasons to refuse changed experts, for slices and for experts at home.
ADAPTED = (
    "FSEP computes experts from slices, and their two linear layers are no modules that could be "
    f"wrapped, {_WAY_OUT}"
)
ADAPTED_AT_HOME = (
    "replicas of experts are computed from the parameters that their home was built with, "
    f"{_WAY_OUT}"
)


class BuiltParts:
    """Types of a module's parts, when it was built and now; `reason` refuses changes."""

    def __init__(self, module: torch.nn.Module, reason: str = ADAPTED) -> None:
        self.reason = reason
        self._module = module
        self._built = self._parts()

    def what_changed(self) -> str | None:
        """Describe modules and parameters that were not built here; None if there are none."""
        parts = self._parts()
        others = [name for name, kind in parts.items() if self._built.get(name) is not kind]
        if not others:
            return None
        listed = ", ".join(f"{name} ({parts[name].__name__})" for name in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        return f"its experts have {listed}{more}, which FSEP did not build: {self.reason}"

    def _parts(self) -> dict[str, type]:
        module = self._module
        # Between steps Megatron-FSDP puts its shards in the places of parameters.
        return {
            name: type(getattr(part, "orig_param", part))
            for name, part in (*module.named_modules(), *module.named_parameters())
            if part is not module
        }
