"""Whole experts of a layer through one pass and its backward.

The table in `megatron_laer/life.py` has the actions that events lead to, by the kinds of the pass.
Here they are carried out, on the weights and gradients of `slots.py`. Where payloads serve one
direction, backward has weights of its own (`backward_weights`). Frozen matrices have no gradient to
compute, reduce or wait for.

Legend: C slots per rank, R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from megatron_laer.life import Action, Cell, Column, Event, Kind, Kinds, column, kinds_of
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.weights.autograd import (
    Gradients,
    node,
    placeholder,
    run_on_backward,
    unused,
)
from megatron_laer.runtime.weights.share import Share
from megatron_laer.runtime.weights.slots import ExchangeStreams, RestoredWeights, SlotGrads

GradsReady = Callable[[Sequence[torch.nn.Parameter]], None]

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
        follow: returns the weights to which backward comes next, or None.
        report: reports parameters of stock's modules whose main gradients have the sums over
            replicas, after stock's own report without these; None without the model.
    """

    def __init__(
        self,
        name: str,
        share: Share,
        index: LayoutIndex,
        streams: ExchangeStreams,
        kinds: Kinds = frozenset(),
        delayed: deque[Callable[[], None]] | None = None,
    ) -> None:
        has_directions = share.for_backward is not share
        self.share = share
        self.weights = self.backward_weights = RestoredWeights(name, share, index, streams)
        if has_directions:
            self.backward_weights = RestoredWeights(name, share.for_backward, index, streams)
        self._all_weights = dict.fromkeys((self.weights, self.backward_weights))
        self.grads = SlotGrads(self.weights, streams)
        self._exchange = streams.exchange
        self._delayed = deque() if delayed is None else delayed
        self.follow: Callable[[], RestoredWeights | None] = lambda: None
        self.report: GradsReady | None = None
        self._wait: torch.Tensor | None = None  # of the coming pass
        self._kinds = kinds
        self._become({Kind.HOMES: share.at_home, Kind.DIRECTIONS: has_directions})

    @property
    def index(self) -> LayoutIndex:
        return self.weights.index

    @property
    def trains(self) -> bool:
        return torch.is_grad_enabled() and bool(self.share.trained)

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
        if not self.trains:
            return
        parameters: tuple[torch.Tensor, ...] = self.share.trained
        # Hooks of stock's parameters run in the experts' part, with stock's gradients.
        if self._reports:
            if self.report is None:
                raise ValueError(_NO_MODEL)
            parameters = (unused(parameters[0]),)
        self._wait = node(lambda one, *_: placeholder(one), lambda _: self._finish(), *parameters)

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
                Kind.FROZEN: not self.trains,
            }
        )
        joins = Action.JOIN_WAIT in self.life[Event.GATE]
        if joins and self._wait is None:
            self.make_wait()
        wait, self._wait = self._wait, None
        if not joins or wait is None:
            return tokens
        # With the tokens' gradient the wait's node may run. Megatron's combined schedule runs the
        # backward of a layer's parts one by one, theirs last.
        joined: torch.Tensor = node(
            lambda tokens, _: tokens.view_as(tokens),
            lambda grad: (grad, placeholder(wait)),
            tokens,
            wait,
        )
        return joined

    def dispatch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark the tokens to dispatch: with their gradient the weights' gradients leave."""
        if not (leaves := self.life[Event.DISPATCH_GRAD]):
            return tokens
        return run_on_backward(partial(self.grads.let_go, sums=Action.SUM in leaves), tokens)[0]

    def before_compute(
        self, *inputs: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        """Return the restored experts' inputs, and placeholders of the weights, `[C, R, K]`.

        The arrival of their gradients ends the weights' use.
        """
        share, slots = self.share, self.weights.replica_slots
        weights = [
            placeholder(matrix[0], (slots, *size))
            for matrix, size in zip(share.matrices, share.sizes, strict=True)
        ]
        trained_at = share.trained_at if self.trains else ()
        placeholders = [weights[at] for at in trained_at]
        arrived = partial(self._grads_arrived, self.life)
        marked = run_on_backward(arrived, *inputs, placeholders=placeholders)
        for at, matrix in zip(trained_at, marked[len(inputs) :], strict=True):
            weights[at] = matrix
        return marked[: len(inputs)], weights

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

    def _grads_arrived(self, life: Column, *grads_CRK: torch.Tensor) -> None:
        """End the use of the weights; these are the gradients of those that are trained."""
        self._do(life[Event.INPUT_GRAD])
        if not grads_CRK:
            return
        self.grads.receive(grads_CRK)
        if Action.DELAY in life[Event.WEIGHT_GRADS]:
            self._delayed.append(self.grads.compute_delayed)

    def _finish(self) -> Gradients:
        finishes = Action.FINISH in self.life[Event.WAIT]
        summed = self.grads.finish_reduce() if finishes else self.share.added()
        if not self._reports:
            return summed
        if self.report is not None:
            self.report(self.share.trained)
        return (None,)

    # Cells and actions.

    @property
    def _reports(self) -> bool:
        return Action.REPORT in self.life[Event.WAIT] and self.share.have_main_grads

    def _become(self, found: Mapping[Kind, bool]) -> None:
        """Pick the column of the pass, of which these kinds are known now."""
        self._kinds = self._kinds.difference(found) | kinds_of(found)
        self.life = column(self._kinds)

    def _do(self, cell: Cell) -> None:
        for action in cell:
            _ACTIONS[action](self)


_ACTIONS: Mapping[Action, Callable[[RestoredExperts], None]] = {
    Action.RESTORE: lambda experts: experts.weights.start_restore(),
    Action.RESTORE_BACKWARD: lambda experts: experts.backward_weights.start_restore(),
    Action.KEEP: lambda experts: experts.weights.keep(),
    Action.FREE: lambda experts: experts.weights.used(),
    Action.FREE_BACKWARD: lambda experts: experts.backward_weights.used(),
    Action.HAND_ON: lambda experts: experts.backward_weights.fetch(experts.follow(), starts=False),
    Action.FETCH: lambda experts: experts.backward_weights.fetch(experts.follow()),
}
