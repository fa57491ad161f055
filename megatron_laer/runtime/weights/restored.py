"""Whole experts of a layer through one pass and its backward.

The table in `megatron_laer/life.py` has the actions that events lead to, by the kinds of the pass;
here they are carried out. Between them:

- The GEMM of a matrix waits for the weights (`matrix`), in forward and in backward. Autograd saves
  none.
- If the layout changes after the gate, `change` fetches the slots that differ.
- If the next pass, forward or backward, is through the same layer, weights are handed on to it
  instead of being freed.
- Sums over replicas are added to Megatron's main gradients on the gradients' communication stream.

Payloads may serve one direction. Then backward has weights of its own (`backward_weights`). Frozen
matrices have no gradient to compute, reduce or wait for.

Legend: C slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from megatron_laer.life import Action, Cell, Column, Event, Kind, Kinds, column, kinds_of
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.autograd import (
    Gradients,
    join_wait,
    placeholder,
    run_on_backward,
    unused,
    wait_for_grads,
    whole_matrices,
)
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored_weights import RestoredWeights
from megatron_laer.runtime.weights.share import Share
from megatron_laer.runtime.weights.slot_grads import LateGrads, SlotGrads

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
        has_directions = share.for_backward is not share
        self.share = share
        self.weights = self.backward_weights = RestoredWeights(name, share, index, streams)
        if has_directions:
            self.backward_weights = RestoredWeights(name, share.for_backward, index, streams)
        self._all_weights = dict.fromkeys((self.weights, self.backward_weights))
        self.grads = SlotGrads(self.weights, streams)
        self._exchange = streams.exchange
        self._late = late or LateGrads()
        self.previous: RestoredExperts | None = None
        self.ends_backward: Callable[[RestoredWeights], None] | None = None
        self._wait: torch.Tensor | None = None  # of the coming pass
        self._kinds = kinds
        self._become({Kind.HOMES: share.at_home, Kind.DIRECTIONS: has_directions})

    @property
    def index(self) -> LayoutIndex:
        return self.weights.index

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
        share = self.share
        if not self._trains:
            return
        parameters: tuple[torch.Tensor, ...] = share.trained
        # Hooks of stock's parameters run in the experts' part, with stock's gradients.
        if Action.REPORT in self.life[Event.WAIT] and share.have_main_grads:
            if self._late.report is None:
                raise ValueError(_NO_MODEL)
            parameters = (unused(share.likes[0]),)
        self._wait = wait_for_grads(self._finish, parameters)

    # Called by the layer.

    def gate(self, tokens: torch.Tensor, *, reruns: bool = False) -> torch.Tensor:
        """Pick the pass's column, and join the wait to the tokens, whose graph may end there.

        Args:
            reruns: whether this is the re-run of a checkpoint, whose backward follows.
        """
        self._become(
            {
                Kind.FIRST: not reruns and Kind.FIRST in self._kinds,
                Kind.RERUN: reruns,
                Kind.EMPTY: not self.index.placed.has_replicas,
                Kind.FROZEN: not self._trains,
            }
        )
        joins = Action.JOIN_WAIT in self.life[Event.GATE]
        if joins and self._wait is None:
            self.make_wait()
        wait, self._wait = self._wait, None
        return join_wait(tokens, wait) if joins and wait is not None else tokens

    def dispatch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark the tokens to dispatch: with their gradient the weights' gradients leave."""
        if not (leaves := self.life[Event.DISPATCH_GRAD]):
            return tokens
        return run_on_backward(partial(self.grads.let_go, sums=Action.SUM in leaves), tokens)[0]

    def weight_placeholders(self) -> tuple[torch.Tensor, ...]:
        share, slots = self.share, self.weights.replica_slots
        weights = [
            placeholder(like, (slots, own.rows, own.columns))
            for like, own in zip(share.likes, share.own, strict=True)
        ]
        if self._trains:
            computed = partial(self._grads_computed, self.life)
            trained = whole_matrices(computed, [weights[at] for at in share.trained_at])
            for at, matrix in zip(share.trained_at, trained, strict=True):
                weights[at] = matrix
        return tuple(weights)

    def before_compute(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mark the restored experts' inputs, whose gradients' arrival ends the weights' use."""
        return run_on_backward(partial(self._do, self.life[Event.INPUT_GRAD]), *inputs)

    def weight_grads(self, position: int, compute: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return a matrix's gradients, or zeros if `backward_dw` will compute them."""
        delays = Action.DELAY in self.life[Event.WEIGHT_GRADS]
        return self.grads.write(position, compute, delays=delays)

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

    def _finish(self) -> Gradients:
        share, cell = self.share, self.life[Event.WAIT]
        summed = self.grads.finish_reduce() if Action.FINISH in cell else share.added()
        if Action.REPORT not in cell or not share.have_main_grads:
            return summed
        if self._late.report is not None:
            self._late.report(share.trained)
        return (None,)

    # Cells and actions.

    @property
    def _trains(self) -> bool:
        return torch.is_grad_enabled() and bool(self.share.trained)

    def _become(self, found: Mapping[Kind, bool]) -> None:
        """Pick the column of the pass, of which these kinds are known now."""
        self._kinds = self._kinds.difference(found) | kinds_of(found)
        self.life = column(self._kinds)

    def _do(self, cell: Cell) -> None:
        for action in cell:
            _ACTIONS[action](self)

    def _hand_on(self) -> None:
        """Leave backward's weights to the layer's own pass, if that is next."""
        following = None if self.previous is None else self.previous.first_in_backward
        if following is not None and following.share is self.backward_weights.share:
            self.backward_weights.hand_on(following)

    def _fetch(self) -> None:
        """Start the restore of the layer that backward comes to next, or hand the weights on."""
        if self.previous is None:
            if self.ends_backward is not None:
                self.ends_backward(self.backward_weights)
        elif (following := self.previous.first_in_backward) is not None:
            self.backward_weights.fetch(following)


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
