"""Backward of a layer in parts, where Megatron runs these at times of its own.

Its combined 1F1B schedule makes a graph of each part of a layer: attention with the router,
dispatch, experts, combine. And weight gradients may be computed by `backward_dw`, later than those
of the inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

GradsReady = Callable[[Sequence[torch.nn.Parameter]], None]


@dataclass(eq=False)
class SplitBackward:
    """Parts of one layer's backward, for all of its passes.

    Attributes:
        by_parts: whether each part of the layer is a graph of its own.
        delays_weights: whether `backward_dw` computes weight gradients.
        computes_weights: for each pass whose input gradients are computed, oldest first, the
            function that `backward_dw` calls.
        grads_ready: reports parameters of stock's modules whose main gradients have the sums over
            replicas, after stock's own report without these; None outside of steps.
    """

    by_parts: bool = False
    delays_weights: bool = False
    computes_weights: deque[Callable[[], None]] = field(default_factory=deque)
    grads_ready: GradsReady | None = None
