"""Whole experts of a layer through one pass and its backward.

The life of a layer's weights (`restored_weights.py`) and gradients (`slot_grads.py`) in one
microbatch, by states (`states.py`):

 1. The weights are SHARDED: every rank holds its share of the experts; no other memory is used.
 2. The scheduler calls `start_restore` during the previous layer's compute: RESTORING. If the
    layout changes after the gate, `change` fetches the slots that differ: still RESTORING.
 3. The GEMM of the first matrix calls `matrix`, which waits: RESTORED.
 4. `after_compute` ends the forward: SHARDED, and the memory is free, unless the weights are kept
    for backward (`--fsep-restore GIB`). Autograd saves no weights.
    Evaluation ends here. A checkpoint's re-run keeps them, since its backward follows at once.
 5. The gradient of the experts' output arrives in backward: RESTORING again, and RESTORED. The
    layer that backward comes to next follows (`prefetch_in_backward`).
 6. The gradients of the experts' inputs and weights are computed: SHARDED, the memory is free.
    If the next pass, forward or backward, is through the same layer, 4 and 6 hand the weights on
    to it instead. Only slots that differ are fetched.
 7. The weights' gradients wait for the tokens' gradients, which go first: DEFERRED. Without
    overlap this is skipped; with `--fsep-restore step` they are SUMMED over microbatches.
 8. The dispatch's backward is done and starts the reduce: REDUCING. Sums over replicas are added
    to Megatron's main gradients on the gradients' communication stream.
 9. Autograd calls `finish_reduce` after the previous layer's backward. It waits for the reduce,
    and marks the gradients as added: NONE.

Payloads of mxfp8 serve one direction. Then backward has weights of its own (`backward_weights`),
whose life is 5 and 6. No forward keeps them, or hands its own on to them.

Frozen matrices have no gradient to compute, reduce or wait for. The scheduler decides when an
exchange starts.

Legend: C slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.autograd import (
    SlicesToSlots,
    WaitForGrads,
    WaitForGradsAfterBlock,
    WaitWithTokens,
    placeholder,
    run_on_backward,
)
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import Share
from megatron_laer.runtime.weights.restored_weights import RestoredWeights, weights_of
from megatron_laer.runtime.weights.slot_grads import SlotGrads
from megatron_laer.runtime.weights.split_backward import SplitBackward
from megatron_laer.runtime.weights.states import ExpertsState

_NO_MODEL = (
    "--overlap-moe-expert-parallel-comm with experts at home: their gradients are complete after "
    "Megatron's own report, and without the model nothing reports them again; pass model= to "
    "training_step, or take --fsep-sharding rows"
)


class RestoredExperts:
    """Whole experts of one layer for one microbatch, and their part of autograd's graph."""

    def __init__(
        self,
        weights: RestoredWeights,
        grads: SlotGrads,
        streams: ExchangeStreams,
        split: SplitBackward | None = None,
        backward_weights: RestoredWeights | None = None,
    ) -> None:
        self.weights = weights
        self.backward_weights = backward_weights or weights
        self.grads = grads
        self._share = weights.share
        self._exchange = streams.exchange
        self._split = split or SplitBackward()
        self._next_in_backward: RestoredExperts | None = None
        # Created ahead, one tuple per coming pass; step-held experts can queue two.
        self._placeholders: deque[tuple[torch.Tensor, ...]] = deque()
        self._waits_after_block = False
        self._defers_reduce = False
        self._ends_backward: Callable[[RestoredWeights], None] | None = None
        self.has_backward = True
        self._reruns = False

    @classmethod
    def for_pass(
        cls,
        name: str,
        share: Share,
        index: LayoutIndex,
        streams: ExchangeStreams,
        split: SplitBackward | None = None,
    ) -> RestoredExperts:
        weights, backward = weights_of(name, share, index, streams)
        return cls(weights, SlotGrads(weights, streams), streams, split, backward)

    @property
    def index(self) -> LayoutIndex:
        return self.weights.index

    @property
    def state(self) -> ExpertsState:
        return self.weights.state

    def is_same_layer(self, other: RestoredExperts) -> bool:
        return self._share is other._share

    # Called by the scheduler and the planner of microbatches.

    def expect_no_backward(self) -> None:
        """Skip the restore for backward: the inputs of this pass need no gradient."""
        self.has_backward = False
        self.weights.hand_on(None)
        if self._in_directions:
            self.backward_weights.used()  # fetched ahead

    def expect_rerun(self) -> None:
        """Note that a checkpoint runs this pass's forward again before its backward."""
        self._reruns = True

    @property
    def first_in_backward(self) -> RestoredWeights:
        return self.weights if self._reruns else self.backward_weights

    def start_backward_restore(self) -> None:
        """Start the restore for backward, if one is expected. Collective then."""
        if self.has_backward:
            self.first_in_backward.start_restore()

    def change(self, index: LayoutIndex) -> None:
        """Switch to another layout. Collective where weights are being restored, or are there."""
        for weights in dict.fromkeys((self.weights, self.backward_weights)):
            weights.change(index)

    def release(self) -> None:
        """Free weights that were fetched for a pass which does not follow."""
        for weights in dict.fromkeys((self.weights, self.backward_weights)):
            weights.used()

    def prefetch_in_backward(self, previous: RestoredExperts) -> None:
        """Start the restore of `previous` in this backward, or hand the weights on to it."""
        self._next_in_backward = previous

    def call_in_backward(self, call: Callable[[RestoredWeights], None]) -> None:
        """Call this with the chunk's first weights, the last ones in backward, in their turn."""
        self._ends_backward = call

    def wait_for_grads_here(self) -> None:
        """Create the node that waits for this pass's gradients: the earlier, the later it runs."""
        self._placeholders.append(self._make_wait_node())

    def wait_for_grads_after_block(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mark hidden states, whose gradient's arrival waits for this layer's gradients."""
        if not self._share.trained:
            return hidden
        self._waits_after_block = True
        marked: torch.Tensor = WaitForGradsAfterBlock.apply(
            self.grads.finish_reduce, hidden, *self._share.trained
        )
        return marked

    # Called by the layer.

    def wait_for_grads_with(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark tokens whose graph ends before the experts; its backward ends with the wait."""
        if not (self._split.by_parts and torch.is_grad_enabled() and self._share.trained):
            return tokens
        made = self._placeholders.popleft() if self._placeholders else self._make_wait_node()
        marked: torch.Tensor = WaitWithTokens.apply(tokens, *made)
        return marked

    def reduce_after_dispatch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark the tokens to dispatch, whose gradient's arrival starts a deferred reduce."""
        if self._split.by_parts:
            waits = self.index.placed.has_replicas and bool(self._share.trained)
            return self._reduce_after(tokens) if waits else tokens
        if not self.index.placed.has_replicas:
            self._placeholders.clear()  # step-held experts would keep those of every pass
            return tokens
        # Delayed gradients too are sent later than a wait that is made with the experts.
        delays = self._split.delays_weights and not self._waits_after_block
        waits_early = self._share.waits_inside or delays
        if waits_early and torch.is_grad_enabled() and not self._placeholders:
            # Older than the mark below, so its wait follows the start of the reduce.
            self.wait_for_grads_here()
        placeholders = self._placeholders[0] if self._placeholders else ()
        waits_later = self._waits_after_block or any(part.requires_grad for part in placeholders)
        return self._reduce_after(tokens) if waits_later else tokens

    def _reduce_after(self, tokens: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and tokens.requires_grad):
            return tokens
        self._defers_reduce = True
        return run_on_backward(self.grads.start_deferred, tokens)[0]

    def weight_placeholders(self) -> tuple[torch.Tensor, ...]:
        shapes, trained_at = self.weights.shapes, self._share.trained_at
        weights = [
            placeholder(parameter.detach(), shape)
            for parameter, shape in zip(self._share.likes, shapes, strict=True)
        ]
        bypassed = self._waits_after_block or self._split.by_parts
        placeholders = None
        if self._placeholders and not self._split.by_parts:
            placeholders = self._placeholders.popleft()
        if bypassed:
            # Gradients bypass these; they only make autograd run `SlicesToSlots`.
            placeholders = tuple(
                placeholder(like.detach(), ()).requires_grad_() for like in self._trained_likes
            )
        elif placeholders is None:
            placeholders = self._make_wait_node()
        defers, self._defers_reduce = self._defers_reduce, False
        if placeholders:
            trained: tuple[torch.Tensor, ...] = SlicesToSlots.apply(
                partial(self._grads_computed, defers),
                [shapes[at] for at in trained_at],
                not bypassed,
                *placeholders,
            )
            for at, weight in zip(trained_at, trained, strict=True):
                weights[at] = weight
        return tuple(weights)

    def before_compute(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mark the restored experts' inputs, whose gradients' arrival ends the weights' use."""
        return run_on_backward(self._used_in_backward, *inputs)

    def weight_grads(self, position: int, compute: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return a matrix's gradients, or zeros if `backward_dw` will compute them."""
        if self._split.delays_weights:
            return self.grads.delay(position, compute)
        grad_CRK = self.grads.new(position)
        compute(grad_CRK)
        return grad_CRK

    def after_compute(self, output: torch.Tensor, *, backward_follows: bool) -> torch.Tensor:
        """Mark the experts' output, whose gradient's arrival starts the restore for backward.

        `backward_follows` keeps the weights for an immediate backward, or starts its restore.
        """
        if torch.is_grad_enabled() and not output.requires_grad:
            self.expect_no_backward()
        if self._in_directions:
            self.weights.used()
            if backward_follows:
                self._reruns = False
                self.start_backward_restore()
        elif not backward_follows:
            if self.has_backward:
                self.weights.keep()
            self.weights.used()
        return run_on_backward(self._begin_backward, output)[0]

    def prepare_backward(self) -> None:
        """Build backward's index tensors of a new layout, while the device computes the experts."""
        if self.index.placed.has_replicas:
            self._exchange.prepare_restore(self.index)
            self._exchange.prepare_reduce(self.index)

    # Called by autograd.

    def _begin_backward(self) -> None:
        self._exchange.count.backwards += 1
        self.backward_weights.start_restore()
        following = self._next_in_backward
        if following and following.first_in_backward.share is self.backward_weights.share:
            self.backward_weights.hand_on(following.first_in_backward)
        elif following is not None and not (
            self._split.by_parts and self.index.placed.has_replicas
        ):
            following.start_backward_restore()
        elif following is None and self._ends_backward is not None:
            self._ends_backward(self.backward_weights)

    def _used_in_backward(self) -> None:
        self.backward_weights.used()
        # Between parts of a layer another microbatch runs, whose experts take the second place.
        if self._split.by_parts and self._next_in_backward is not None:
            self._next_in_backward.start_backward_restore()

    def _grads_computed(self, defers: bool, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        # Inputs without gradients have not ended the use of the weights. The other inputs' nodes
        # were created later and have run, so frozen matrices are unused too.
        self._used_in_backward()
        if self._split.delays_weights:
            self._split.computes_weights.append(partial(self._compute_weights, defers, grads_CRK))
        else:
            self._send(defers, grads_CRK)

    def _compute_weights(self, defers: bool, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        self._send(defers, self.grads.compute_delayed(grads_CRK))

    def _send(self, defers: bool, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        if defers:
            self.grads.defer(grads_CRK)
        else:
            self.grads.start_reduce(grads_CRK)

    def _make_wait_node(self) -> tuple[torch.Tensor, ...]:
        share = self._share
        if not share.trained:
            return ()
        finish = self.grads.finish_reduce
        parameters: tuple[torch.Tensor, ...] = share.trained
        if self._split.by_parts and share.waits_inside:
            finish = self._finish_apart
            # Their hooks run in the experts' part, with stock's gradients.
            if share.have_main_grads:
                if self._split.grads_ready is None:
                    raise ValueError(_NO_MODEL)
                parameters = (placeholder(share.likes[0].detach(), ()).requires_grad_(),)
        made: tuple[torch.Tensor, ...] = WaitForGrads.apply(
            finish, self._trained_likes, *parameters
        )
        return made

    def _finish_apart(self) -> tuple[torch.Tensor | None, ...]:
        share = self._share
        summed = self.grads.finish_reduce() if self.index.placed.has_replicas else share.added()
        if not share.have_main_grads:
            return summed
        if self._split.grads_ready is not None:
            self._split.grads_ready(share.trained)
        return (None,)

    @property
    def _in_directions(self) -> bool:
        return self.backward_weights is not self.weights

    @property
    def _trained_likes(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(self._share.likes[at] for at in self._share.trained_at)
