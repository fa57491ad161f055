"""Whole experts of one layer for all microbatches of a step: restored once, reduced once.

With M microbatches the layer's exchanges fall from 3·M to 2. In return a rank holds the restored
matrices of every layer, and float32 sums of their gradients, as long as the step runs.

Legend: E experts, C slots per rank, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.restored import ExchangeStreams, RestoredExperts, Slices


class StepExperts(RestoredExperts):
    """One layer's restored experts, shared by the microbatches of a step, and by steps.

    Needs Megatron's main gradients: through a bfloat16 parameter's `grad` the sum of a step would
    be rounded, on more than the wire between nodes.

    Raises:
        ValueError: slices without main gradients.
    """

    def __init__(
        self, name: str, slices: Slices, index: LayoutIndex, lanes: ExchangeStreams
    ) -> None:
        if not slices.have_main_grads:
            raise ValueError(
                f"--fsep-restore step, {name}: adds gradients to Megatron's main gradients, and "
                "these parameters have none; wrap the model in Megatron's DistributedDataParallel, "
                "or take --fsep-restore layer"
            )
        super().__init__(name, slices, index, lanes)
        self._num_microbatches = self._left = 0
        self._sums_CRK: list[torch.Tensor] = []

    def begin_step(self, index: LayoutIndex, num_microbatches: int) -> None:
        """Another step, perhaps under another layout.

        What an earlier step left because its weights did not change is kept: of it, only slots that
        differ are fetched.
        """
        self.change(index)
        self._num_microbatches = self._left = num_microbatches

    def end_step(self, *, weights_changed: bool) -> None:
        """The step is over; what was restored is of no use any more once weights changed."""
        if weights_changed:
            super().release()

    def release(self) -> None:
        """Between microbatches everything stays."""

    def reduce(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Add a microbatch's gradients; send the sum with the last one. Collective then."""
        if not self._sums_CRK:
            self._sums_CRK = [
                self._lanes.grads.take(tuple(grad.shape), torch.float32, grad.device).copy_(grad)
                for grad in grads_CRK
            ]
        else:
            for sum_CRK, grad_CRK in zip(self._sums_CRK, grads_CRK, strict=True):
                sum_CRK.add_(grad_CRK)
        self._give_grads()
        self._left -= 1
        if self._left == 0:
            super().reduce(self._sums_CRK)
            self._left = self._num_microbatches  # Megatron's rerun state machine repeats steps

    def reduced(self) -> tuple[torch.Tensor, ...]:
        """Stand-ins; with the last microbatch, main gradients receive the step's sum."""
        if self._reduced is None:
            return tuple(map(self._lanes.mark_in_main_grad, self._slices.parameters))
        handed_over = super().reduced()
        for sum_CRK in self._sums_CRK:
            self._lanes.grads.put_back(sum_CRK)
        self._sums_CRK = []
        return handed_over


def memory_held(layers: Sequence[Slices], capacity: int) -> str:
    """What holding these layers' experts over a step takes on one rank, in words."""
    matrices = [
        (capacity * rows * slice_ErK.shape[2], slice_ErK.element_size())
        for layer in layers
        for rows, slice_ErK in zip(layer.rows, layer.parameters, strict=True)
    ]
    weights = sum(elements * size for elements, size in matrices)
    sums = sum(4 * elements for elements, _ in matrices)
    return (
        f"--fsep-restore step holds the restored experts of {len(layers)} layers "
        f"({weights / 2**20:.1f} MiB), and sums of their gradients ({sums / 2**20:.1f} MiB)"
    )
