"""Whole experts of a layer through one pass and its backward.

The table in `megatron_laer/life.py` has the actions that events lead to, by the kinds of the pass;
here they are carried out. States (`states.py`) of a plain pass:

 1. The weights are SHARDED: every rank holds its share of the experts; no other memory is used.
 2. The scheduler starts the restore during the previous layer's compute: RESTORING. If the layout
    changes after the gate, `change` fetches the slots that differ: still RESTORING.
 3. The GEMM of the first matrix calls `matrix`, which waits: RESTORED.
 4. `after_compute` ends the forward: SHARDED, and the memory is free, unless the weights are kept
    for backward (`--fsep-restore GIB`). Autograd saves no weights.
 5. The gradient of the experts' output arrives in backward: RESTORING again, and RESTORED. The
    layer that backward comes to next follows.
 6. The gradients of the experts' inputs and weights are computed: SHARDED, the memory is free.
    If the next pass, forward or backward, is through the same layer, 4 and 6 hand the weights on
    to it instead. Only slots that differ are fetched.
 7. The weights' gradients wait for the tokens' gradients, which go first: DEFERRED.
 8. The dispatch's backward is done and starts the reduce: REDUCING. Sums over replicas are added
    to Megatron's main gradients on the gradients' communication stream.
 9. Autograd calls `finish_reduce` after the previous layer's backward. It waits for the reduce,
    and marks the gradients as added: NONE.

Payloads may serve one direction. Then backward has weights of its own (`backward_weights`),
whose life is 5 and 6. Frozen matrices have no gradient to compute, reduce or wait for.

Legend: C slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import torch

from megatron_laer.life import Action, Cell, Column, Event, Kind, Kinds, column
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.autograd import (
    SlicesToSlots,
    WaitForGrads,
    WaitWithTokens,
    placeholder,
    run_on_backward,
)
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import LateGrads, Share
from megatron_laer.runtime.weights.restored_weights import RestoredWeights
from megatron_laer.runtime.weights.slot_grads import SlotGrads
from megatron_laer.runtime.weights.states import ExpertsState

_NO_MODEL = (
    "--overlap-moe-expert-parallel-comm with experts at home: their gradients are complete after "
    "Megatron's own report, and without the model nothing reports them again; pass model= to "
    "training_step, or take --fsep-sharding rows"
)


class RestoredExperts:
    """Whole experts of one layer for one microbatch, and their part of autograd's graph.

    Attributes:
        weights, backward_weights: the same, unless payloads serve one direction.
        life: the pass's column of `LIFE`, without the kinds that the gate decides until it has.
        previous: experts to which backward comes next.
        ends_backward: called with the weights of a chunk's first layer in backward, in its turn.
    """

    def __init__(
        self,
        name: str,
        share: Share,
        index: LayoutIndex,
        streams: ExchangeStreams,
        kinds: Kinds = frozenset(),
        late: LateGrads | None = None,
    ) -> None:
        self.weights = self.backward_weights = RestoredWeights(name, share, index, streams)
        if share.for_backward is not share:
            self.backward_weights = RestoredWeights(name, share.for_backward, index, streams)
            kinds |= {Kind.DIRECTIONS}
        self._all_weights = dict.fromkeys((self.weights, self.backward_weights))
        self.grads = SlotGrads(self.weights, streams)
        self._share = share
        self._exchange = streams.exchange
        self._late = late or LateGrads()
        self.previous: RestoredExperts | None = None
        self.ends_backward: Callable[[RestoredWeights], None] | None = None
        # Created ahead, one tuple per coming pass; step-held experts can queue two.
        self._waits: deque[tuple[torch.Tensor, ...]] = deque()
        if share.waits_inside:
            kinds |= {Kind.HOMES}
        self._kinds = kinds
        self.life = column(kinds)

    @property
    def index(self) -> LayoutIndex:
        return self.weights.index

    @property
    def state(self) -> ExpertsState:
        return self.weights.state

    def is_same_layer(self, other: RestoredExperts) -> bool:
        return self._share is other._share

    # Called by the scheduler and the planner of microbatches.

    def begin_step(self, index: LayoutIndex, num_passes: int) -> None:
        """Begin a step that experts are held over; valid weights fetch only changed slots."""
        self.change(index)
        self.grads.begin_step(num_passes)

    def expect_no_backward(self) -> None:
        """Skip the restore for backward: the inputs of this pass need no gradient."""
        self._become({Kind.EVALUATION: True})
        self.weights.hand_on(None)
        if self.backward_weights is not self.weights:
            self.backward_weights.used()  # fetched ahead

    def expect_rerun(self) -> None:
        """Note that a checkpoint runs this pass's forward again before its backward."""
        self._become({Kind.FIRST: True, Kind.RERUN: False})

    @property
    def first_in_backward(self) -> RestoredWeights | None:
        """Return the weights with which backward comes here; None if it does not."""
        cell = self.life[Event.NEXT_IN_BACKWARD]
        if not cell:
            return None
        return self.weights if Action.RESTORE in cell else self.backward_weights

    def come_back(self) -> None:
        """Start the restore for backward, if one is expected. Collective then."""
        self._do(self.life[Event.NEXT_IN_BACKWARD])

    def change(self, index: LayoutIndex) -> None:
        """Switch to another layout. Collective where weights are being restored, or are there."""
        for weights in self._all_weights:
            weights.change(index)

    def release(self) -> None:
        """Free weights that were fetched for a pass which does not follow."""
        self._do(self.life[Event.RELEASED])

    def free(self) -> None:
        """Free weights that were held, and are no longer valid."""
        for weights in self._all_weights:
            weights.free()

    def make_wait(self) -> None:
        """Make the node that waits for this pass's gradients: the earlier, the later it runs."""
        if torch.is_grad_enabled() and self._share.trained:
            self._waits.append(self._new_wait())

    # Called by the layer.

    def gate(self, tokens: torch.Tensor, *, reruns: bool = False) -> torch.Tensor:
        """Pick the pass's column, and mark the tokens to dispatch, whose graph may end there.

        Args:
            reruns: whether this is the re-run of a checkpoint, whose backward follows.
        """
        self._become(
            {
                Kind.FIRST: not reruns and Kind.FIRST in self._kinds,
                Kind.RERUN: reruns,
                Kind.EMPTY: not self.index.placed.has_replicas,
                Kind.FROZEN: not (torch.is_grad_enabled() and self._share.trained),
            }
        )
        if Action.WAIT_WITH_TOKENS in self.life[Event.GATE]:
            if not self._waits:
                self.make_wait()
            tokens = WaitWithTokens.apply(tokens, *self._waits.popleft())
        if self.life[Event.DISPATCH_GRAD] and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_()  # whose gradients let the weights' leave
        return tokens

    def dispatch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark the tokens to dispatch, whose gradient's arrival lets the weights' gradients leave.

        A wait that is made here is older than the mark, so that it follows the reduce's start.
        """
        cell = self.life[Event.DISPATCH]
        if Action.DROP_WAITS in cell:
            self._waits.clear()  # step-held experts would keep those of every pass
        elif Action.MAKE_WAIT in cell and not self._waits:
            self.make_wait()
        if not self.life[Event.DISPATCH_GRAD]:
            return tokens
        sums = Action.SUM in self.life[Event.LEAVE]
        return run_on_backward(partial(self.grads.let_go, sums=sums), tokens)[0]

    def weight_placeholders(self) -> tuple[torch.Tensor, ...]:
        shapes, trained_at = self.weights.shapes, self._share.trained_at
        weights = {
            at: placeholder(like.detach(), shapes[at]) for at, like in enumerate(self._share.likes)
        }
        if cell := self.life[Event.BEFORE_EXPERTS]:
            joins = Action.WAIT_WITH_EXPERTS in cell
            # Gradients bypass the others, which only make autograd run `SlicesToSlots`.
            wait = self._waits.popleft() if joins else [*map(_unused, self._trained_likes)]
            trained: tuple[torch.Tensor, ...] = SlicesToSlots.apply(
                partial(self._grads_computed, self.life),
                [shapes[at] for at in trained_at],
                joins,
                *wait,
            )
            weights |= zip(trained_at, trained, strict=True)
        return tuple(weights.values())

    def before_compute(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mark the restored experts' inputs, whose gradients' arrival ends the weights' use."""
        return run_on_backward(partial(self._do, self.life[Event.INPUT_GRAD]), *inputs)

    def weight_grads(self, position: int, compute: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return a matrix's gradients, or zeros if `backward_dw` will compute them."""
        if Action.DELAY in self.life[Event.WEIGHT_GRADS]:
            return self.grads.delay(position, compute)
        grad_CRK = self.grads.new(position)
        compute(grad_CRK)
        return grad_CRK

    def after_compute(self, output: torch.Tensor) -> torch.Tensor:
        """Mark the experts' output, whose gradient's arrival starts the restore for backward."""
        if torch.is_grad_enabled() and not output.requires_grad:
            self.expect_no_backward()
        self._do(self.life[Event.AFTER_EXPERTS])
        return run_on_backward(partial(self._begin_backward, self.life), output)[0]

    # Called by autograd.

    def _begin_backward(self, life: Column) -> None:
        self._exchange.count.backwards += 1
        self._do(life[Event.OUTPUT_GRAD])

    def _grads_computed(self, life: Column, grads_CRK: tuple[torch.Tensor, ...]) -> None:
        # Nodes of the inputs were created later and have run, so frozen matrices are unused too.
        self.grads.receive(grads_CRK)
        if Action.DELAY in life[Event.WEIGHT_GRADS]:
            self._late.computes.append(self.grads.compute_delayed)
        else:
            self.grads.defer()

    def _new_wait(self) -> tuple[torch.Tensor, ...]:
        share = self._share
        parameters: tuple[torch.Tensor, ...] = share.trained
        # Hooks of stock's parameters run in the experts' part, with stock's gradients.
        if Action.REPORT in self.life[Event.WAIT] and share.have_main_grads:
            if self._late.report is None:
                raise ValueError(_NO_MODEL)
            parameters = (_unused(share.likes[0]),)
        made: tuple[torch.Tensor, ...] = WaitForGrads.apply(
            self._finish, self._trained_likes, *parameters
        )
        return made

    def _finish(self) -> tuple[torch.Tensor | None, ...]:
        share, cell = self._share, self.life[Event.WAIT]
        summed = self.grads.finish_reduce() if Action.FINISH in cell else share.added()
        if Action.REPORT not in cell or not share.have_main_grads:
            return summed
        if self._late.report is not None:
            self._late.report(share.trained)
        return (None,)

    @property
    def _trained_likes(self) -> tuple[torch.nn.Parameter, ...]:
        return tuple(self._share.likes[at] for at in self._share.trained_at)

    # Cells and actions.

    def _become(self, found: Mapping[Kind, bool]) -> None:
        """Pick the column of the pass, of which these kinds are known now."""
        self._kinds = self._kinds.difference(found) | {kind for kind in found if found[kind]}
        self.life = column(self._kinds)

    def _do(self, cell: Cell) -> None:
        for action in cell:
            _ACTIONS[action](self)

    def _hand_on(self) -> None:
        """Leave backward's weights to the layer's own pass, if that is next."""
        if self.previous is None:
            return
        following = self.previous.first_in_backward
        if following is not None and following.share is self.backward_weights.share:
            self.backward_weights.hand_on(following)

    def _fetch(self) -> None:
        """Start the restore of the layer that backward comes to next, or hand the weights on."""
        if self.previous is None:
            if self.ends_backward is not None:
                self.ends_backward(self.backward_weights)
        elif (following := self.previous.first_in_backward) is not None:
            self.backward_weights.fetch(following)


def _unused(like: torch.Tensor) -> torch.Tensor:
    """Return a leaf of autograd's graph whose gradient nothing reads."""
    return placeholder(like.detach(), ()).requires_grad_()


_ACTIONS: Mapping[Action, Callable[[RestoredExperts], None]] = {
    Action.RESTORE: lambda experts: experts.weights.start_restore(),
    Action.RESTORE_BACKWARD: lambda experts: experts.backward_weights.start_restore(),
    Action.KEEP: lambda experts: experts.weights.keep(),
    Action.FREE: lambda experts: experts.weights.used(),
    Action.FREE_BACKWARD: lambda experts: experts.backward_weights.used(),
    Action.HAND_ON: RestoredExperts._hand_on,
    Action.FETCH: RestoredExperts._fetch,
    Action.MAKE_WAIT: RestoredExperts.make_wait,
}
