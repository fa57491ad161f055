"""`StepExperts` serve all microbatches of a step: they are restored once and reduced once.

With M microbatches the layer's exchanges fall from 3·M to 2. In return a rank holds the restored
matrices of every layer, and float32 sums of their gradients, as long as the step runs.

Legend: E experts, C slots per rank, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slices import Slices
from megatron_laer.runtime.weights.states import GradState


class StepExperts(RestoredExperts):
    """Holds one layer's restored experts, shared by the microbatches of a step, and by steps.

    Needs Megatron's main gradients: through a bfloat16 parameter's `grad` the sum of a step would
    be rounded, on more than the wire between nodes.

    Raises:
        ValueError: slices without main gradients.
    """

    def __init__(
        self, name: str, slices: Slices, index: LayoutIndex, streams: ExchangeStreams
    ) -> None:
        if not slices.have_main_grads:
            raise ValueError(
                f"--fsep-restore step, {name}: adds gradients to Megatron's main gradients, and "
                "these parameters have none; wrap the model in Megatron's DistributedDataParallel, "
                "or take --fsep-restore layer"
            )
        super().__init__(name, slices, index, streams)
        self._num_passes = self._left = 0
        self._sums_CRK: list[torch.Tensor] = []

    def begin_step(self, index: LayoutIndex, num_passes: int) -> None:
        """Begin another step, perhaps under another layout.

        What an earlier step left because its weights did not change is used again: of it, only
        slots that differ are fetched.

        Args:
            num_passes: through the layer, of all microbatches.
        """
        self.change(index)
        self._num_passes = self._left = num_passes

    def end_step(self, *, weights_changed: bool) -> None:
        """End the step; what was restored is of no use any more once weights changed."""
        if weights_changed:
            self._free_weights()

    def start_reduce(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Add a pass's gradients; send the sum with the last one. Collective then."""
        if not self._sums_CRK:
            pool = self._streams.grads
            self._sums_CRK = [
                pool.take(tuple(grad.shape), torch.float32, grad.device).copy_(grad)
                for grad in grads_CRK
            ]
        else:
            for sum_CRK, grad_CRK in zip(self._sums_CRK, grads_CRK, strict=True):
                sum_CRK.add_(grad_CRK)
        self.state.enter(GradState.SUMMED)
        self._free_grads()
        self._left -= 1
        if self._left == 0:
            super().start_reduce(self._sums_CRK)
            self._left = self._num_passes  # Megatron's rerun state machine repeats steps

    def finish_reduce(self) -> tuple[torch.Tensor, ...]:
        """Return dummy gradients; while the sum is on its way, wait until main gradients have it.

        Another pass of the same microbatch may have begun its backward, or ended it, by then.
        """
        if self.state.grads is not GradState.REDUCING:
            return tuple(map(self._slices.main_grads.mark_added, self._slices.trained))
        handed_over = super().finish_reduce()
        for sum_CRK in self._sums_CRK:
            self._streams.grads.put_back(sum_CRK)
        self._sums_CRK = []
        return handed_over

    def _weights_used(self) -> None:
        """Keep the weights: other microbatches of the step use them too."""


def memory_held(layers: Sequence[Slices], capacity: int) -> str:
    """Say how much memory it takes on one rank to hold these layers' experts over a step."""
    matrices = [
        (capacity * rows * columns, parameter)
        for layer in layers
        for rows, columns, parameter in zip(
            layer.rows, layer.columns, layer.parameters, strict=True
        )
    ]
    weights = sum(elements * parameter.element_size() for elements, parameter in matrices)
    sums = sum(4 * elements for elements, parameter in matrices if parameter.requires_grad)
    return (
        f"--fsep-restore step holds the restored experts of {len(layers)} layers "
        f"({weights / 2**20:.1f} MiB), and sums of their gradients ({sums / 2**20:.1f} MiB)"
    )
