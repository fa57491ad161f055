"""`Slices` is what exchanges see of a layer's parameters: a slice of every expert, per matrix.

A bias is a matrix of one column to them, though the parameter is flat.

How slices are initialised and saved is not here (`layer/experts/slices.py`).

Legend: E experts, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class MainGrads(Protocol):
    """Knows the gradients that a training framework keeps beside parameters, in its own buffers."""

    def kept_for(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Tell whether the framework keeps such gradients for all of these parameters."""
        ...

    def of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return what the framework keeps for a parameter, to which gradients are added."""
        ...

    def mark_added(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Tell the framework that a gradient was added.

        Returns:
            A dummy gradient, for autograd.
        """
        ...


class SlicedLayer(Protocol):
    """Is a layer as far as its weights go."""

    @property
    def name(self) -> str:
        """Return the layer's name."""
        ...

    @property
    def slices(self) -> Slices:
        """Return the layer's slices, as exchanges see them."""
        ...

    @property
    def passes(self) -> int:
        """Return how many passes each microbatch makes through the layer."""
        ...


@dataclass(frozen=True)
class Slices:
    """Holds a rank's slices of a layer's experts.

    Attributes:
        parameters: `[E, r, K]` for each matrix, `[E·r]` for each bias.
        rows: R of each matrix.
        main_grads: knows where the parameters' gradients are accumulated.
    """

    parameters: tuple[torch.nn.Parameter, ...]
    rows: tuple[int, ...]
    main_grads: MainGrads

    @property
    def columns(self) -> tuple[int, ...]:
        """Return K of each matrix, 1 of each bias."""
        return tuple(
            parameter.shape[2] if parameter.dim() == 3 else 1 for parameter in self.parameters
        )

    def values(self, num_experts: int) -> tuple[torch.Tensor, ...]:
        """Return the parameters as they are now, each as `[E, r, K]`."""
        return tuple(
            parameter.detach().view(
                num_experts, parameter.numel() // num_experts // columns, columns
            )
            for parameter, columns in zip(self.parameters, self.columns, strict=True)
        )

    @property
    def trained_at(self) -> tuple[int, ...]:
        """Return the positions of the matrices that are trained; the others are frozen."""
        return tuple(at for at, part in enumerate(self.parameters) if part.requires_grad)

    @property
    def trained(self) -> tuple[torch.nn.Parameter, ...]:
        """Return the parameters that are trained, of which alone there are gradients."""
        return tuple(self.parameters[at] for at in self.trained_at)

    @property
    def have_main_grads(self) -> bool:
        """Whether gradients are added to main gradients, and not returned to autograd."""
        return self.main_grads.kept_for(self.trained)
