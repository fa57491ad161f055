"""Megatron-Bridge's LoRA on experts at home: the narrow matrices that a replica needs.

Megatron-Bridge replaces a linear layer by a wrapper of the layer (`to_wrap`) and its adapter, after
the model is built. Home experts compute with the wrapper itself. Each of an adapter's two linear
layers is an expert's own, and travels with it. Or all experts of all ranks share it, and every rank
has it. Nothing of Megatron-Bridge is imported here.

Legend: h home experts, T tokens, R output features (rows), K input features, q the adapter's rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Wrappers by the names of their classes, with the adapters of consecutive parts of the output.
_PARTS: dict[str, tuple[str, ...]] = {
    "LoRALinear": (),
    "LoRALinearSplitFC1UpGate": ("adapter_gate", "adapter_up"),
}
_ADAPTERS = (
    "ParallelLinearAdapter",
    "GroupedExpertLinearAdapter",
    "SharedOuterGroupedExpertAdapter",
)
_LINEARS = ("linear_in", "linear_out")

WAY_OUT = (
    "adapt experts by LoRA or CanonicalLoRA of Megatron-Bridge without dropout, or give as targets "
    "layers of attention alone, such as linear_qkv and linear_proj"
)

# A home expert's own parameters, one for all of them as `[h, R, K]`, or a layer that all share.
Side = tuple[torch.nn.Parameter, ...] | torch.nn.Module


@dataclass(frozen=True)
class LowRank:
    """Scaled product of two narrow matrices, `[q, K]` and `[R, q]`."""

    sides: tuple[Side, Side]
    scale: float


@dataclass(frozen=True)
class Adapter:
    """Adapters of one linear layer of all home experts; `parts` of the output follow each other."""

    wrappers: tuple[torch.nn.Module, ...]
    parts: tuple[LowRank, ...]

    @property
    def homes(self) -> tuple[tuple[torch.nn.Parameter, ...], ...]:
        """Return the matrices that travel with their experts, in the order of `output`."""
        return tuple(side for side in self._sides if isinstance(side, tuple))

    def output(
        self, input_TK: torch.Tensor, product: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor | None:
        """Return the term `[T, R]` of the replicas' output; None while adapters are disabled.

        Args:
            product: multiplies each slot's tokens by the slot's matrix of this index in `homes`.
        """
        if not all(getattr(wrapper, "_adapter_enabled", True) for wrapper in self.wrappers):
            return None
        at, outputs = 0, []
        for part in self.parts:
            hidden = input_TK
            for side in part.sides:
                if isinstance(side, tuple):
                    hidden, at = product(hidden, at), at + 1
                else:
                    hidden, _ = side(hidden)
            outputs.append(hidden * part.scale)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @property
    def trains_shared(self) -> bool:
        return any(parameter.requires_grad for parameter in self._shared)

    def summary(self) -> str:
        """Describe all that must be equal on all ranks, with a checksum of what experts share."""
        shapes = [tuple(matrix[0].shape) for matrix in self.homes]
        scales = [part.scale for part in self.parts]
        return f"{shapes} times {scales}, shared {[*map(_checksum, self._shared)]}"

    @property
    def _shared(self) -> list[torch.nn.Parameter]:
        layers = (side for side in self._sides if not isinstance(side, tuple))
        return [parameter for layer in layers for parameter in layer.parameters()]

    @property
    def _sides(self) -> list[Side]:
        return [side for part in self.parts for side in part.sides]


def find_adapter(linears: Sequence[torch.nn.Module], *, grouped: bool) -> Adapter | None:
    """Return the adapter of one linear layer of all home experts; None if there is none.

    Args:
        linears: of each home expert in turn, or one grouped layer of all of them.

    Raises:
        ValueError: an adapter that replicas cannot compute, and what works.
    """
    wrappers = tuple(linear for linear in linears if _is_wrapper(linear))
    if not wrappers:
        return None
    kinds = {type(linear).__name__ for linear in linears}
    names = _PARTS[type(wrappers[0]).__name__] or (None,)
    found = [] if len(kinds) > 1 else [[_part(one, name) for one in wrappers] for name in names]
    if not found or any(len({_sizes(one) for one in adapters}) > 1 for adapters in found):
        raise ValueError(
            f"{len(wrappers)} of {len(linears)} home experts have adapters, of unlike kinds or "
            f"sizes, but any expert may have replicas: adapt all of them alike; {WAY_OUT}"
        )
    parts = []
    for adapters in found:
        down, up = (
            _side([getattr(adapter, linear) for adapter in adapters], grouped)
            for linear in _LINEARS
        )
        parts.append(LowRank((down, up), adapters[0].alpha / adapters[0].dim))
    return Adapter(wrappers, tuple(parts))


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether experts of a model have adapters."""
    return any(".experts." in name and _is_wrapper(part) for name, part in model.named_modules())


def _is_wrapper(linear: torch.nn.Module) -> bool:
    return type(linear).__name__ in _PARTS and hasattr(linear, "to_wrap")


def _part(wrapper: Any, name: str | None) -> Any:
    adapter = wrapper.adapter if name is None else wrapper.adapter[name]
    kind = type(adapter).__name__
    if kind not in _ADAPTERS:
        raise ValueError(f"an adapter is a {kind}, which replicas cannot compute; {WAY_OUT}")
    if not isinstance(adapter.activation, torch.nn.Identity):
        raise ValueError(f"an adapter has an activation, {adapter.activation}; {WAY_OUT}")
    if getattr(adapter.dropout, "p", 0.0) > 0.0:
        raise ValueError(
            f"an adapter has dropout={adapter.dropout.p}: replicas would draw other numbers than "
            f"their home, so that runs were not stock's; set dropout=0, and {WAY_OUT}"
        )
    return adapter


def _sizes(adapter: Any) -> tuple[Any, ...]:
    return adapter.alpha, adapter.dim, *(getattr(adapter, name).weight.shape for name in _LINEARS)


def _side(linears: Sequence[Any], grouped: bool) -> Side:
    """Return the experts' own matrices, or a linear layer of all experts."""
    weights = tuple(linear.weight for linear in linears)
    if not grouped or weights[0].dim() == 3:
        return weights
    (shared,) = linears
    if shared.weight.requires_grad and not shared.weight._backward_hooks:
        raise ValueError(
            "the experts of a rank share an adapter whose gradient other ranks do not share, as in "
            f"old releases of Megatron-Bridge: set share_expert_adapters=False, or {WAY_OUT}"
        )
    layer: torch.nn.Module = shared
    return layer


def _checksum(parameter: torch.Tensor) -> int:
    whole = parameter.detach().cpu().contiguous().view(torch.uint8)
    return zlib.crc32(whole.numpy().tobytes())
