"""Modules and parameters that a layer's experts were built with, to notice later changes."""

from __future__ import annotations

from collections.abc import Collection

import torch

from megatron_laer.layer.experts.adapters import WAY_OUT

# Maximum number of foreign modules per message.
_SHOWN = 4

# Reasons to refuse changed experts, for slices and for experts at home.
ADAPTED = (
    "FSEP computes experts from slices, and their two linear layers are no modules that could be "
    "wrapped, so adapters such as LoRA cannot be on them; take --fsep-sharding experts for LoRA of "
    "Megatron-Bridge, give as targets layers of attention alone, such as linear_qkv and "
    "linear_proj, or leave out --expert-parallel-mode fsep"
)
ADAPTED_AT_HOME = (
    "replicas are computed from the parameters that their home was built with, and from adapters "
    f"of Megatron-Bridge; {WAY_OUT}, or leave out --expert-parallel-mode fsep"
)


class BuiltParts:
    """Types of a module's parts, when it was built and now; `reason` refuses changes."""

    def __init__(self, module: torch.nn.Module, reason: str = ADAPTED) -> None:
        self.reason = reason
        self._module = module
        self._built = self._parts()

    def what_changed(self, wrappers: Collection[torch.nn.Module] = ()) -> str | None:
        """Describe modules and parameters that were not built here; None if there are none.

        Args:
            wrappers: of linear layers, whose adapters are known.
        """
        parts = self._parts(wrappers)
        others = [name for name, kind in parts.items() if self._built.get(name) is not kind]
        if not others:
            return None
        listed = ", ".join(f"{name} ({parts[name].__name__})" for name in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        return f"its experts have {listed}{more}, which FSEP did not build: {self.reason}"

    def _parts(self, wrappers: Collection[torch.nn.Module] = ()) -> dict[str, type]:
        module = self._module
        wrapped = [name for name, part in module.named_modules() if part in wrappers]
        # Between steps Megatron-FSDP puts its shards in the places of parameters.
        parts = {
            name: type(getattr(part, "orig_param", part))
            for name, part in (*module.named_modules(), *module.named_parameters())
            if part is not module and name not in wrapped
        }
        for name in wrapped:
            inner = f"{name}.to_wrap"
            parts = {
                part.replace(inner, name): kind
                for part, kind in parts.items()
                if not f"{part}.".startswith(f"{name}.adapter.")
            }
        return parts
