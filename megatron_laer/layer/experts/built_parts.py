"""Modules and parameters that a layer's experts were built with, to notice later changes."""

from __future__ import annotations

import torch

# Maximum number of foreign modules per message.
_SHOWN = 4

# Reason to refuse changed experts.
ADAPTED = (
    "FSEP computes experts from slices, and their two linear layers are no modules that could be "
    "wrapped, so adapters such as LoRA cannot be on them; give as targets layers of attention "
    "alone, such as linear_qkv and linear_proj, or leave out --expert-parallel-mode fsep"
)


class BuiltParts:
    """Types of a module's parts, when it was built and now."""

    def __init__(self, module: torch.nn.Module) -> None:
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
        return f"its experts have {listed}{more}, which FSEP did not build: {ADAPTED}"

    def _parts(self) -> dict[str, type]:
        module = self._module
        return {
            name: type(part)
            for name, part in (*module.named_modules(), *module.named_parameters())
            if part is not module
        }
