"""`RestoredExperts` follows the whole experts of a layer through one pass and its backward.

The life of a layer's weights (`restored_weights.py`) and gradients (`slot_grads.py`) in one
microbatch, by states (`states.py`):

 1. The weights are SHARDED: every rank holds a slice of every expert, and no memory is taken.
 2. `start_restore`, called by the scheduler while the layer before computes: RESTORING. If the
    layout changes after the gate, `change` fetches the slots that differ: RESTORING still.
 3. The GEMM of the first matrix asks for it by `matrix`, which waits: RESTORED.
 4. `after_compute` ends the forward: SHARDED, and the memory is free. Autograd saves no weights.
    Evaluation ends here. A checkpoint's re-run keeps them, since its backward follows at once.
 5. The gradient of the experts' output arrives in backward: RESTORING again, and RESTORED. The
    layer that backward comes to next follows (`prefetch_in_backward`).
 6. The gradients of the experts' inputs and weights are computed: SHARDED, the memory is free.
    Where a microbatch makes its next pass through the same layer, the weights are handed on to that
    pass in 4 and 6 instead. Only slots that differ are fetched.
 7. The weights' gradients wait for the tokens' gradients, which go first: DEFERRED. Without overlap
    this is left out, and with `--fsep-restore step` they are SUMMED over microbatches.
 8. The dispatch's backward is done and starts the reduce: REDUCING. Sums over replicas are added to
    Megatron's main gradients where they are computed, on the gradients' communication stream.
 9. `finish_reduce`, called by autograd after the backward of the layer before, waits for that, and
    marks the gradients as added. No gradient is left: NONE.

Of frozen matrices no gradient is computed, reduced or waited for; autograd sees no parameter.

The scheduler decides when an exchange starts.

Legend: C slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.autograd import (
    SlicesToSlots,
    WaitForGrads,
    WaitForGradsAfterBlock,
    placeholder,
    run_on_backward,
)
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import Slices
from megatron_laer.runtime.weights.restored_weights import RestoredWeights
from megatron_laer.runtime.weights.slot_grads import SlotGrads
from megatron_laer.runtime.weights.states import ExpertsState


class RestoredExperts:
    """Whole experts of one layer for one microbatch, and their part of autograd's graph."""

    def __init__(
        self, weights: RestoredWeights, grads: SlotGrads, streams: ExchangeStreams
    ) -> None:
        self.weights = weights
        self.grads = grads
        self._slices = weights.slices
        self._exchange = streams.exchange
        self._next_in_backward: RestoredExperts | None = None
        # Created ahead, one tuple per coming pass; experts that are held over a step can queue two.
        self._placeholders: deque[tuple[torch.Tensor, ...]] = deque()
        self._waits_after_block = False
        self._defers_reduce = False
        self._has_backward = True

    @classmethod
    def for_pass(
        cls, name: str, slices: Slices, index: LayoutIndex, streams: ExchangeStreams
    ) -> RestoredExperts:
        """Make the experts of a single pass, not restored yet."""
        weights = RestoredWeights(name, slices, index, streams)
        return cls(weights, SlotGrads(weights, streams), streams)

    @property
    def index(self) -> LayoutIndex:
        return self.weights.index

    @property
    def state(self) -> ExpertsState:
        return self.weights.state

    def is_same_layer(self, other: RestoredExperts) -> bool:
        """Return whether both are experts of one layer, in two passes of it."""
        return self._slices is other._slices

    # Called by the scheduler and the planner of microbatches.

    def expect_no_backward(self) -> None:
        """Restore nothing for a backward pass: the inputs of this pass need no gradient."""
        self._has_backward = False

    def start_backward_restore(self) -> None:
        """Start to fetch the slots' experts for backward, if that comes. Collective then."""
        if self._has_backward:
            self.weights.start_restore()

    def prefetch_in_backward(self, previous: RestoredExperts) -> None:
        """Restore `previous` too when the backward of these experts begins.

        It is the MoE layer before in the same chunk and microbatch, to which backward comes next.
        If that is an earlier pass of this layer, it is given the weights when backward is done.
        """
        self._next_in_backward = previous

    def wait_for_grads_here(self) -> None:
        """Make the node that waits for this pass's gradients now.

        The earlier it is made in forward, the later it runs in backward.
        """
        self._placeholders.append(self._make_wait_node())

    def wait_for_grads_after_block(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mark hidden states, on whose gradient's arrival this layer's gradients are waited for.

        Whatever uses the hidden states must use the marked ones.
        """
        if not self._slices.trained:
            return hidden
        self._waits_after_block = True
        marked: torch.Tensor = WaitForGradsAfterBlock.apply(
            self.grads.finish_reduce, hidden, *self._slices.trained
        )
        return marked

    # Called by the layer.

    def reduce_after_dispatch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark the tokens to dispatch, on whose gradient's arrival the reduce starts.

        The reduce starts without them where it would be waited for at once, or where experts or
        tokens need no gradient.
        """
        placeholders = self._placeholders[0] if self._placeholders else ()
        waits_later = self._waits_after_block or any(part.requires_grad for part in placeholders)
        if not (waits_later and torch.is_grad_enabled() and tokens.requires_grad):
            return tokens
        self._defers_reduce = True
        return run_on_backward(self.grads.start_deferred, tokens)[0]

    def weight_placeholders(self) -> tuple[torch.Tensor, ...]:
        """Make the tensors that stand for the weights in autograd's graph of this pass."""
        shapes, trained_at = self.weights.shapes, self._slices.trained_at
        weights = [
            placeholder(parameter.detach(), shape)
            for parameter, shape in zip(self._slices.parameters, shapes, strict=True)
        ]
        placeholders = self._placeholders.popleft() if self._placeholders else None
        if self._waits_after_block:
            # Gradients take the other way; these only make autograd run `SlicesToSlots`.
            placeholders = tuple(
                placeholder(slice_ErK.detach(), slice_ErK.shape).requires_grad_()
                for slice_ErK in self._slices.trained
            )
        elif placeholders is None:
            placeholders = self._make_wait_node()
        defers, self._defers_reduce = self._defers_reduce, False
        if placeholders:
            trained: tuple[torch.Tensor, ...] = SlicesToSlots.apply(
                partial(self._grads_computed, defers),
                [shapes[at] for at in trained_at],
                not self._waits_after_block,
                *placeholders,
            )
            for at, weight in zip(trained_at, trained, strict=True):
                weights[at] = weight
        return tuple(weights)

    def before_compute(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mark the experts' inputs, whose gradients' arrival ends the use of the weights."""
        return run_on_backward(self.weights.used, *inputs)

    def after_compute(self, output: torch.Tensor, *, backward_follows: bool) -> torch.Tensor:
        """Mark the experts' output, on whose gradient's arrival the weights are needed again.

        Args:
            backward_follows: at once, so that the weights are kept for it.
        """
        if torch.is_grad_enabled() and not output.requires_grad:
            self.expect_no_backward()
        if not backward_follows:
            self.weights.used()
        return run_on_backward(self._begin_backward, output)[0]

    def prepare_backward(self) -> None:
        """Build the index tensors that backward needs, which a layout made for this pass lacks.

        Called when the experts' compute is queued, so that the device is busy meanwhile.
        """
        self._exchange.prepare_restore(self.index)
        self._exchange.prepare_reduce(self.index)

    # Called by autograd.

    def _begin_backward(self) -> None:
        self._exchange.count.backwards += 1
        self.weights.start_restore()
        following = self._next_in_backward
        if following is not None and self.is_same_layer(following):
            self.weights.hand_on(following.weights)
        elif following is not None:
            following.start_backward_restore()

    def _grads_computed(self, defers: bool, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        # Inputs that need no gradient have not ended the use. Those that need one have their
        # gradient by now, since their nodes were made later. So frozen matrices are done with too.
        self.weights.used()
        if defers:
            self.grads.defer(grads_CRK)
        else:
            self.grads.start_reduce(grads_CRK)

    def _make_wait_node(self) -> tuple[torch.Tensor, ...]:
        if not self._slices.trained:
            return ()
        made: tuple[torch.Tensor, ...] = WaitForGrads.apply(
            self.grads.finish_reduce, *self._slices.trained
        )
        return made
