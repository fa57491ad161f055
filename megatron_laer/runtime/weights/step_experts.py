"""Experts for all microbatches of a step: restored once and reduced once.

With M microbatches the layer's exchanges fall from 3·M to 2, or to 3 where payloads serve one
direction. In return a rank holds the restored matrices of every layer, and float32 sums of their
gradients, as long as the step runs. With experts at home these are replicas; the homes' own
gradients are stock's, microbatch by microbatch.

Legend: C replica slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import Share, restored_bytes
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.restored_weights import RestoredWeights, weights_of
from megatron_laer.runtime.weights.slot_grads import SlotGrads
from megatron_laer.runtime.weights.split_backward import SplitBackward
from megatron_laer.runtime.weights.states import GradState


class StepGrads(SlotGrads):
    """Sums of one layer's gradients over the passes of a step, reduced after the last one."""

    def __init__(self, weights: RestoredWeights, streams: ExchangeStreams) -> None:
        super().__init__(weights, streams)
        self._pool = streams.grads
        self._num_passes = self._left = 0
        self._sums_CRK: list[torch.Tensor] = []

    def begin_step(self, num_passes: int) -> None:
        self._num_passes = self._left = num_passes

    def start_reduce(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Add a pass's gradients; send the sum with the last one. Collective then."""
        if not self._sums_CRK:
            self._sums_CRK = [
                self._pool.take(tuple(grad.shape), torch.float32, grad.device).copy_(grad)
                for grad in grads_CRK
            ]
        else:
            for sum_CRK, grad_CRK in zip(self._sums_CRK, grads_CRK, strict=True):
                sum_CRK.add_(grad_CRK)
        self.state.enter(GradState.SUMMED)
        self._delayed.clear()
        self.free()
        self._left -= 1
        if self._left == 0:
            super().start_reduce(self._sums_CRK)
            self._left = self._num_passes  # Megatron's rerun state machine repeats steps

    def finish_reduce(self) -> tuple[torch.Tensor | None, ...]:
        """Return autograd's gradients; wait for main gradients if the sum is being reduced."""
        if self.state.grads is not GradState.REDUCING:
            return self.share.added()
        handed_over = super().finish_reduce()
        for sum_CRK in self._sums_CRK:
            self._pool.put_back(sum_CRK)
        self._sums_CRK = []
        return handed_over


class StepExperts:
    """One layer's restored experts, shared by the microbatches of a step, and by steps.

    In place of main gradients, a bfloat16 parameter's `grad` would round the sum of a step.
    """

    def __init__(
        self,
        name: str,
        share: Share,
        index: LayoutIndex,
        streams: ExchangeStreams,
        split: SplitBackward | None = None,
    ) -> None:
        if not share.have_main_grads:
            raise ValueError(
                f"--fsep-restore step, {name}: adds gradients to Megatron's main gradients, and "
                "these parameters have none; wrap the model in Megatron's DistributedDataParallel, "
                "or take --fsep-restore layer"
            )
        weights, backward = weights_of(name, share, index, streams, keeps=True)
        self._grads = StepGrads(weights, streams)
        self.experts = RestoredExperts(weights, self._grads, streams, split, backward)

    def begin_step(self, index: LayoutIndex, num_passes: int) -> None:
        """Begin another step; weights that are still valid fetch only changed slots."""
        self.experts.change(index)
        self._grads.begin_step(num_passes)

    def end_step(self, *, weights_changed: bool) -> None:
        if weights_changed:
            self.experts.weights.free()
            self.experts.backward_weights.free()


def memory_held(layers: Sequence[Share], replica_slots: int) -> str:
    """Describe the memory that one rank needs to hold these layers' experts over a step."""
    matrices = [
        (replica_slots * rows * columns, parameter)
        for layer in layers
        for rows, columns, parameter in zip(layer.rows, layer.columns, layer.likes, strict=True)
    ]
    held = [share for layer in layers for share in dict.fromkeys((layer, layer.for_backward))]
    weights = sum(restored_bytes(share, replica_slots) for share in held)
    sums = sum(4 * elements for elements, parameter in matrices if parameter.requires_grad)
    return (
        f"--fsep-restore step holds the restored experts of {len(layers)} layers "
        f"({weights / 2**20:.1f} MiB), and sums of their gradients ({sums / 2**20:.1f} MiB)"
    )
