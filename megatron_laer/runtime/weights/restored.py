"""`RestoredExperts` holds whole experts of a layer while something computes with them.

The life of a layer's weights and gradients in one microbatch, told by states (`states.py`):

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
    pass in 4 and 6 instead, and only slots that differ are fetched.
 7. The weights' gradients wait for the tokens' gradients, which go first: DEFERRED. Without overlap
    this is left out, and with `--fsep-restore step` they are SUMMED over microbatches.
 8. The dispatch's backward is done and starts the reduce: REDUCING. Sums over replicas are added to
    Megatron's main gradients where they are computed, on the gradients' communication stream.
 9. `finish_reduce`, called by autograd after the backward of the layer before, waits for that, and
    tells Megatron that gradients were added. No gradient is left: NONE.

Of frozen matrices no gradient is computed, reduced or waited for; autograd sees no parameter.

When an exchange starts is the scheduler's business. The memory of weights and gradients is taken
and given back here alone: others tell `RestoredExperts` what happened, and it draws conclusions.

Legend: E experts, C slots per rank, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch

from megatron_laer.runtime.comm.exchange import ReusableWeights
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.streams import Pending
from megatron_laer.runtime.weights.autograd import (
    Restore,
    WaitForGrads,
    WaitForGradsAfterBlock,
    placeholder,
    run_on_backward,
)
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.slices import Slices
from megatron_laer.runtime.weights.states import ExpertsState, GradState, WeightState
from megatron_laer.telemetry.trace_events import Activity, Kind


class RestoredExperts:
    """Holds the slots' matrices `[C, R, K]` of one layer for one microbatch, and their gradients.

    Attributes:
        index: the layout that they are restored under.
        state: read by others, moved on here only.
    """

    def __init__(
        self, name: str, slices: Slices, index: LayoutIndex, streams: ExchangeStreams
    ) -> None:
        self.index = index
        self.state = ExpertsState(name)
        self._name = name
        self._slices = slices
        self._streams = streams
        self._matrices: tuple[Pending, ...] = ()
        # Buffers of the gradients that this layer's GEMMs write, and those kept in DEFERRED.
        self._grads_CRK: list[torch.Tensor] = []
        self._deferred_CRK: tuple[torch.Tensor, ...] = ()
        self._slice_grads: tuple[Pending, ...] = ()
        self._next_in_backward: RestoredExperts | None = None
        self._heir: RestoredExperts | None = None
        # Of the passes to come, of which experts that are held over a step may have two.
        self._placeholders: deque[tuple[torch.Tensor, ...]] = deque()
        self._waits_after_block = False
        self._defers_reduce = False
        self._has_backward = True

    # What the scheduler and the coordinator tell.

    def start_restore(self) -> None:
        """Begin to fetch the slots' experts, unless that was begun. Collective over the group."""
        if self.state.weights is not WeightState.SHARDED:
            return
        self.state.enter(WeightState.RESTORING)
        exchange, weights = self._streams.exchange, self._streams.weights
        exchange.prepare_restore(self.index)
        self._matrices = tuple(
            self._streams.parameters.submit(
                # The slices as they are now: they change between steps only.
                partial(
                    exchange.restore,
                    slice_ErK,
                    self.index,
                    rows,
                    out=weights.take(shape, slice_ErK.dtype, slice_ErK.device),
                ),
                Activity(Kind.RESTORE, self._name),
            )
            for slice_ErK, rows, shape in zip(
                self._values(), self._slices.rows, self._shapes(), strict=True
            )
        )
        exchange.count.restores += 1

    def change(self, index: LayoutIndex) -> None:
        """Follow another layout; of what was begun, only slots that differ are fetched again.

        Collective over the group if `start_restore` was.
        """
        before, self.index = self.index, index
        if self.state.weights is WeightState.SHARDED or index is before:
            return
        self.state.enter(WeightState.RESTORING)
        self._streams.exchange.prepare_restore(index, before)
        self._matrices = tuple(
            self._streams.parameters.submit(
                partial(self._update, slice_ErK, index, rows, before, pending),
                Activity(Kind.CHANGE, self._name),
            )
            for slice_ErK, rows, pending in zip(
                self._values(), self._slices.rows, self._matrices, strict=True
            )
        )
        self._streams.exchange.count.changes += 1

    def is_same_layer(self, other: RestoredExperts) -> bool:
        """Tell whether both are experts of one layer, in two passes of it."""
        return self._slices is other._slices

    def hand_on(self, following: RestoredExperts) -> None:
        """Give the weights to the layer's following pass when these experts have computed."""
        self._heir = following

    def expect_no_backward(self) -> None:
        """Take this pass for one without a backward pass, since its inputs need no gradient."""
        self._has_backward = False

    def start_backward_restore(self) -> None:
        """Begin to fetch the slots' experts for backward, if that comes. Collective then."""
        if self._has_backward:
            self.start_restore()

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
            self.finish_reduce, hidden, *self._slices.trained
        )
        return marked

    # What the layer tells.

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
        return run_on_backward(self._start_deferred_reduce, tokens)[0]

    def weight_placeholders(self) -> tuple[torch.Tensor, ...]:
        """Make the tensors that stand for the weights in autograd's graph, where gradients go.

        Its nodes are those of the pass that begins.
        """
        shapes, trained_at = self._shapes(), self._slices.trained_at
        weights = [
            placeholder(parameter.detach(), shape)
            for parameter, shape in zip(self._slices.parameters, shapes, strict=True)
        ]
        placeholders = self._placeholders.popleft() if self._placeholders else None
        if self._waits_after_block:
            # Gradients take the other way; these only make autograd run `Restore`.
            placeholders = tuple(
                placeholder(slice_ErK.detach(), slice_ErK.shape).requires_grad_()
                for slice_ErK in self._slices.trained
            )
        elif placeholders is None:
            placeholders = self._make_wait_node()
        defers, self._defers_reduce = self._defers_reduce, False
        if placeholders:
            trained: tuple[torch.Tensor, ...] = Restore.apply(
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
        return run_on_backward(self._weights_used, *inputs)

    def after_compute(self, output: torch.Tensor, *, backward_follows: bool) -> torch.Tensor:
        """Mark the experts' output, on whose gradient's arrival the weights are needed again.

        Args:
            backward_follows: at once, so that the weights are kept for it.
        """
        if torch.is_grad_enabled() and not output.requires_grad:
            self.expect_no_backward()
        if not backward_follows:
            self._weights_used()
        return run_on_backward(self._begin_backward, output)[0]

    def prepare_backward(self) -> None:
        """Build the index tensors that backward needs, which a layout made for this pass lacks.

        Called when the experts' compute is queued, so that the device is busy meanwhile.
        """
        self._streams.exchange.prepare_restore(self.index)
        self._streams.exchange.prepare_reduce(self.index)

    def matrix(self, position: int) -> torch.Tensor:
        """Return the `position`-th matrix of every slot, having waited for it."""
        self.start_restore()
        matrix_CRK = self._matrices[position].wait()
        if self.state.weights is WeightState.RESTORING:
            self.state.enter(WeightState.RESTORED)
        return matrix_CRK

    def new_grad(self, position: int) -> torch.Tensor:
        """Take memory for the gradient of the `position`-th matrix."""
        slice_ErK = self._slices.parameters[position]
        grad_CRK = self._streams.grads.take(
            self._shapes()[position], slice_ErK.dtype, slice_ErK.device
        )
        self._grads_CRK.append(grad_CRK)
        return grad_CRK

    # What backward brings about.

    def start_reduce(self, grads_CRK: Sequence[torch.Tensor]) -> None:
        """Begin to send whole gradients to their slices. Collective over the group."""
        self.state.enter(GradState.REDUCING)
        exchange = self._streams.exchange
        exchange.prepare_reduce(self.index)
        self._slice_grads = tuple(
            self._streams.gradients.submit(
                partial(
                    exchange.reduce,
                    grad_CRK,
                    self.index,
                    # A step's sums are float32, and cross nodes as one microbatch's would.
                    wire_dtype=slice_ErK.dtype,
                    add_to=self._main_grad(parameter, slice_ErK),
                ),
                Activity(Kind.REDUCE, self._name),
            )
            for grad_CRK, parameter, slice_ErK in zip(
                grads_CRK, self._slices.trained, self._trained_values(), strict=True
            )
        )
        exchange.count.reduces += 1

    def finish_reduce(self) -> tuple[torch.Tensor, ...]:
        """Wait for the slices' gradients `[E, r, K]`, and return what autograd is given for them.

        Main gradients, where there are any, have received them by then: autograd is given dummy
        gradients, as by Megatron's own fused kernels.
        """
        self.state.enter(GradState.NONE)
        grads_ErK = tuple(pending.wait() for pending in self._slice_grads)
        self._slice_grads = ()
        self._free_grads()
        if not self._slices.have_main_grads:
            return tuple(
                grad_ErK.view(parameter.shape)
                for grad_ErK, parameter in zip(grads_ErK, self._slices.trained, strict=True)
            )
        return tuple(map(self._slices.main_grads.mark_added, self._slices.trained))

    def _begin_backward(self) -> None:
        self._streams.exchange.count.backwards += 1
        self.start_restore()
        following = self._next_in_backward
        if following is not None and self.is_same_layer(following):
            self.hand_on(following)
        elif following is not None:
            following.start_backward_restore()

    def _grads_computed(self, defers: bool, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        # Inputs that need no gradient did not tell it. Those that need one have it by now, since
        # their nodes were made later, so that frozen matrices are not needed any more either.
        self._weights_used()
        if defers:
            self.state.enter(GradState.DEFERRED)
            self._deferred_CRK = grads_CRK
        else:
            self.start_reduce(grads_CRK)

    def _start_deferred_reduce(self) -> None:
        assert self._deferred_CRK, "tokens' gradients arrived before the experts had any"
        grads_CRK, self._deferred_CRK = self._deferred_CRK, ()
        self.start_reduce(grads_CRK)

    # Memory.

    def _weights_used(self) -> None:
        """Conclude from the end of a forward or backward pass that the weights can go."""
        heir, self._heir = self._heir, None
        if heir is not None and heir.state.weights is WeightState.SHARDED:
            heir._take_over(self)
        self._free_weights()

    def _take_over(self, other: RestoredExperts) -> None:
        """Take the other pass's weights. Collective over the group if the layouts differ."""
        other.state.enter(WeightState.SHARDED)
        self._matrices, other._matrices = other._matrices, ()
        self.state.enter(WeightState.RESTORING)
        index, self.index = self.index, other.index
        self.change(index)

    def _free_weights(self) -> None:
        if self.state.weights is not WeightState.SHARDED:
            for pending in self._matrices:
                self._streams.weights.put_back(pending.wait())
            self._matrices = ()
            self.state.enter(WeightState.SHARDED)

    def _free_grads(self) -> None:
        for grad_CRK in self._grads_CRK:
            self._streams.grads.put_back(grad_CRK)
        self._grads_CRK.clear()

    # Helpers.

    def _make_wait_node(self) -> tuple[torch.Tensor, ...]:
        if not self._slices.trained:
            return ()
        made: tuple[torch.Tensor, ...] = WaitForGrads.apply(
            self.finish_reduce, *self._slices.trained
        )
        return made

    def _main_grad(
        self, parameter: torch.nn.Parameter, slice_ErK: torch.Tensor
    ) -> torch.Tensor | None:
        if not self._slices.have_main_grads:
            return None
        return self._slices.main_grads.of(parameter).view(slice_ErK.shape)

    def _values(self) -> tuple[torch.Tensor, ...]:
        return self._slices.values(self.index.layout.num_experts)

    def _trained_values(self) -> list[torch.Tensor]:
        values = self._values()
        return [values[at] for at in self._slices.trained_at]

    def _shapes(self) -> tuple[tuple[int, int, int], ...]:
        capacity = self.index.layout.capacity
        return tuple(
            (capacity, rows, columns)
            for rows, columns in zip(self._slices.rows, self._slices.columns, strict=True)
        )

    def _update(
        self,
        slice_ErK: torch.Tensor,
        index: LayoutIndex,
        rows: int,
        before: LayoutIndex,
        pending: Pending,
    ) -> torch.Tensor:
        """Update a matrix on the communication stream that `pending` runs on, hence after it."""
        reuse = ReusableWeights(before, pending.result())
        return self._streams.exchange.restore(slice_ErK, index, rows, reuse=reuse)
