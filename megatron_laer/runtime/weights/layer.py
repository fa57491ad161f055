"""Static description of a MoE layer: names, sizes and this rank's slices of its experts.

`layer/experts/slices.py` initialises and saves slices.

Legend: E experts, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class MainGrads(Protocol):
    """Access to the gradients that a training framework keeps in buffers of its own."""

    def kept_for(self, parameters: Sequence[torch.nn.Parameter]) -> bool: ...

    def of(self, parameter: torch.nn.Parameter) -> torch.Tensor: ...

    def mark_added(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Mark a parameter's gradient as added, and return a dummy gradient for autograd."""
        ...


@dataclass(frozen=True)
class Slices:
    """A rank's slices of a layer's experts for exchanges: a bias is a matrix with K = 1.

    Attributes:
        parameters: `[E, r, K]` for each matrix, `[E·r]` for each bias.
        rows: R of each matrix.
        main_grads: where the parameters' gradients are accumulated.
    """

    parameters: tuple[torch.nn.Parameter, ...]
    rows: tuple[int, ...]
    main_grads: MainGrads

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(
            parameter.shape[2] if parameter.dim() == 3 else 1 for parameter in self.parameters
        )

    def values(self, num_experts: int) -> tuple[torch.Tensor, ...]:
        return tuple(
            parameter.detach().view(
                num_experts, parameter.numel() // num_experts // columns, columns
            )
            for parameter, columns in zip(self.parameters, self.columns, strict=True)
        )

    @property
    def trained_at(self) -> tuple[int, ...]:
        return tuple(at for at, part in enumerate(self.parameters) if part.requires_grad)

    @property
    def trained(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(self.parameters[at] for at in self.trained_at)

    @property
    def have_main_grads(self) -> bool:
        """Return True if gradients are added to main gradients, and not returned to autograd."""
        return self.main_grads.kept_for(self.trained)


@dataclass(eq=False)
class FsepLayer:
    """Static description of one MoE layer on this rank.

    Attributes:
        index: among the layers of this rank, from 0.
        name: "layer 3" or "mtp 1", counted over the whole model from 1.
        number: the 3 of "layer 3".
        recomputes: whether the MoE layer is a checkpoint of its own.
        passes: of each microbatch through the layer; several where Megatron repeats it.
        what_changed: describes changes to the experts since construction; None if there are none.
        on_step_end: called at the end of a training step.
    """

    index: int
    name: str
    number: int
    is_mtp: bool
    slices: Slices
    recomputes: bool
    passes: int
    what_changed: Callable[[], str | None]
    on_step_end: Callable[[], None]
