"""Gradients that are complete only after Megatron's autograd has asked for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

GradsReady = Callable[[Sequence[torch.nn.Parameter]], None]


@dataclass(eq=False)
class LateGrads:
    """Gradients of a layer that are complete after autograd has asked for them, for all passes.

    Attributes:
        computes: for each pass whose input gradients are computed, oldest first, the function
            that `backward_dw` calls for those of the weights.
        report: reports parameters of stock's modules whose main gradients have the sums over
            replicas, after stock's own report without these; None outside of steps.
    """

    computes: deque[Callable[[], None]] = field(default_factory=deque)
    report: GradsReady | None = None
