"""Scheduler of the overlap of communication and compute, within model chunks and between them.

`life.py` has the rules as data. The scheduler follows a chunk's forward passes by hooks on the
chunk. The layer's calls mark the arrival of tokens, and autograd nodes mark the backward pass.

A chunk's forward for one microbatch leaves a chain of `RestoredExperts`, each with a link to the
previous layer's. Backward follows it, in any order of the pipeline. An operation's last layer
fetches the first one of the operation that `operations.py` expects. If another one begins, those
experts are released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megatron_laer.life import Action, Cell, Event, Kind, Kinds, column
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.operations import Operation, OperationOrder
from megatron_laer.runtime.planning.pass_layouts import PassLayouts, Replayed
from megatron_laer.runtime.weights.restored import GradsReady, RestoredExperts
from megatron_laer.runtime.weights.slots import ExchangeStreams, RestoredWeights


@dataclass
class Chunk:
    """Model chunk: the MoE layers that one forward call of it passes, in order, with repetitions.

    `module` is called once per microbatch and pass. `blocks` are each layer's transformer layer.
    Without them, gradients of blocks that recompute are waited for at once. `await_weights` waits
    until parameters hold a step's weights. `gathers_weights` returns whether Megatron may still be
    gathering them over replicas when the chunk's first forward begins. `replayed` returns the
    experts that the layers' routers will choose; None without router replay. `grads_ready` reports
    main gradients of stock's modules, as `RestoredExperts.report`.
    """

    module: torch.nn.Module
    layers: Sequence[LayerState]
    blocks: Sequence[torch.nn.Module]
    await_weights: Callable[[Sequence[torch.nn.Parameter]], None]
    gathers_weights: Callable[[], bool]
    replayed: Replayed | None
    grads_ready: GradsReady | None = None


@dataclass
class _Forward:
    """Chunk's forward: experts of layers entered, and of the next one, if it is prepared."""

    chunk: Chunk
    operation: Operation | None = None
    entered: list[RestoredExperts] = field(default_factory=list)
    ahead: RestoredExperts | None = None

    @property
    def next_layer(self) -> LayerState | None:
        layers, at = self.chunk.layers, len(self.entered)
        return layers[at] if at < len(layers) else None


class Scheduler:
    """Scheduler of one rank's exchanges of experts, in a run of these kinds."""

    def __init__(self, kinds: Kinds, streams: ExchangeStreams, pass_layouts: PassLayouts) -> None:
        self._life = column(kinds)
        self._streams = streams
        self._pass_layouts = pass_layouts
        self._chunks: list[Chunk] = []
        self._hooks: list[Any] = []
        self._forward: _Forward | None = None
        self._order = OperationOrder(by_direction=Kind.PARTS in kinds)
        self._awaits_backward: dict[Operation, _Forward] = {}
        # First experts of the operations that are expected next, by order.
        self._fetched: dict[bool, tuple[Operation, RestoredExperts]] = {}

    def attach(self, chunks: Sequence[Chunk]) -> None:
        self._detach()
        self._chunks = list(chunks)
        for chunk in self._chunks:
            # Module, hooks and chunk form a reference cycle, which `_detach` breaks.
            self._hooks += [
                chunk.module.register_forward_pre_hook(self._before_forward),
                chunk.module.register_forward_hook(self._after_forward),
            ]
            if Action.MAKE_WAIT in self._life[Event.PREPARED] and chunk.blocks:
                layer_of = dict(zip(chunk.blocks, chunk.layers, strict=True))
                self._hooks += [
                    block.register_forward_pre_hook(partial(self._before_block, layer))
                    for block, layer in layer_of.items()
                ]

    def _before_forward(self, module: torch.nn.Module, _inputs: Any) -> None:
        self.begin_forward(module)

    def _after_forward(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        forward = self._forward
        self.end_forward()
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: self.begin_backward(forward))

    def _before_block(self, layer: LayerState, block: torch.nn.Module, _inputs: Any) -> None:
        """Make the wait of a block that a checkpoint around it runs again, in backward."""
        plan = layer.reruns.next if self._forward is None and block.training else None
        if plan is not None:
            plan.restored.make_wait()

    # Called also where Megatron runs a chunk by parts of layers, without calling its module.

    def begin_forward(self, module: torch.nn.Module) -> object:
        """Begin a chunk's forward; return it for `begin_backward`, None for an unknown chunk."""
        chunks = enumerate(self._chunks)
        number, chunk = next((pair for pair in chunks if pair[1].module is module), (0, None))
        if chunk is None:
            return None
        forward = self._forward = _Forward(chunk)
        if chunk.layers and module.training:
            passes = [layer.next_pass(training=True) for layer in chunk.layers]
            self._pass_layouts.begin_forward(passes, chunk.replayed)
            forward.operation = self._order.begin_forward(number)
            if forward.operation is not None:
                self._awaits_backward[forward.operation] = forward
                forward.ahead = self._take_fetched(forward.operation)
        self._prepare(forward, module.training)
        return forward

    def end_forward(self) -> None:
        self._forward = None

    def begin_backward(self, forward: object) -> None:
        """Begin the backward of a chunk's forward, in which a MoE layer was entered or none."""
        if not (isinstance(forward, _Forward) and forward.entered):
            return
        if forward.operation is not None:
            self._awaits_backward.pop(forward.operation, None)
            self._take_fetched(self._order.begin_backward(forward.operation))
        weights = forward.entered[-1].first_in_backward()
        if weights is not None and self._life[Event.CHUNK_BACKWARD]:
            weights.start_restore()

    @property
    def replays_routing(self) -> bool:
        return any(chunk.replayed is not None for chunk in self._chunks)

    def begin_step(self, num_microbatches: int | None) -> None:
        self._forget_operations()
        num_chunks = sum(bool(chunk.layers) for chunk in self._chunks)
        known = num_microbatches if self._life[Event.LAST_LAYER] else None
        self._order.begin_step(known, num_chunks)

    def end_step(self) -> None:
        self._order.end_step()
        self._forget_operations()

    def close(self) -> None:
        self._detach()
        self._streams.close()

    def enter(self, layer: LayerState, training: bool) -> RestoredExperts:
        """Return the experts of a layer whose forward begins, unless a checkpoint runs it again."""
        forward = self._forward
        if forward is None or forward.next_layer is not layer:
            return self._experts_of(layer, training)
        restored, forward.ahead = forward.ahead or self._experts_of(layer, training), None
        entered = forward.entered
        after = partial(self._following, is_forward=False)
        restored.follow = entered[-1].first_in_backward if entered else after
        restored.report = forward.chunk.grads_ready
        entered.append(restored)
        return restored

    def decided(self, restored: RestoredExperts) -> None:
        """Start the restore of a pass whose layout is decided, before its experts are called."""
        if self._forward is not None:
            self._restore(self._forward.chunk, restored, restored.life[Event.DECIDED])

    def tokens_arrived(self, layer: LayerState, training: bool) -> None:
        """Prepare the layer or operation that follows this layer."""
        forward = self._forward  # none in the re-run of a checkpoint, which happens in backward
        if forward is None or not forward.entered:
            return
        if forward.chunk.layers[len(forward.entered) - 1] is not layer:
            return
        if forward.next_layer is not None:
            self._prepare(forward, training)
        elif forward.operation is not None:
            forward.entered[-1].weights.fetch(self._following(is_forward=True))

    def _experts_of(self, layer: LayerState, training: bool) -> RestoredExperts:
        layout = self._pass_layouts.layout_for(layer.next_pass(training=training))
        return layer.experts_of_pass(layout, training=training)

    def _prepare(self, forward: _Forward, training: bool) -> None:
        """Make the experts of the next layer's pass; start the restore if that is its turn."""
        cell, layer = self._life[Event.PREPARED], forward.next_layer
        if layer is None:
            return
        restored = forward.ahead = forward.ahead or self._experts_of(layer, training)
        present = forward.entered[-1].weights if forward.entered else None
        self._restore(forward.chunk, restored, cell, present)
        follows_itself = present is not None and present.share is restored.share
        # In backward the pass before adds to the same main gradients: the gate makes a later wait.
        if training and Action.MAKE_WAIT in cell and not follows_itself:
            restored.report = forward.chunk.grads_ready
            restored.make_wait()

    @staticmethod
    def _restore(
        chunk: Chunk,
        restored: RestoredExperts,
        cell: Cell,
        present: RestoredWeights | None = None,
    ) -> None:
        if Action.AWAIT in cell:
            chunk.await_weights(restored.share.parameters)
        if present is not None:
            present.fetch(restored.weights, starts=Action.RESTORE in cell)
        elif Action.RESTORE in cell:
            restored.weights.start_restore()

    def _following(self, *, is_forward: bool) -> RestoredWeights | None:
        """Return the first weights of the operation that follows one of this direction."""
        following = self._order.following(is_forward=is_forward)
        restored = None if following is None else self._first_of(following)
        if following is None or restored is None:
            return None
        weights = restored.weights if following.is_forward else restored.first_in_backward()
        if weights is not None:
            self._fetched[self._order.order_of(is_forward=is_forward)] = following, restored
            weights.stay()
        return weights

    def _first_of(self, operation: Operation) -> RestoredExperts | None:
        """Return the first experts of an operation; None if they cannot be fetched now."""
        if not operation.is_forward:
            forward = self._awaits_backward.get(operation._replace(is_forward=True))
            # A forward that runs together with this operation may not be at its last layer yet.
            if forward is None or forward.next_layer is not None:
                return None
            return forward.entered[-1] if self._life[Event.CHUNK_BACKWARD] else None
        chunk = self._chunks[operation.chunk]
        first = chunk.layers[0]
        restores = Action.RESTORE in self._life[Event.PREPARED]
        if not restores or not self._pass_layouts.is_known(first.next_pass(training=True)):
            return None
        # A wait for a chunk's weights before its first forward would change Megatron's order.
        waits = operation.number == 0 and chunk.gathers_weights()
        return None if waits else self._experts_of(first, training=True)

    def _take_fetched(self, begun: Operation) -> RestoredExperts | None:
        """Return the experts fetched for an operation that begins; release those of another."""
        order = self._order.order_of(is_forward=begun.is_forward)
        expected, restored = self._fetched.pop(order, (None, None))
        if restored is not None and expected != begun:
            restored.release()
            return None
        return restored

    def _forget_operations(self) -> None:
        for chunk in self._chunks:
            for layer in chunk.layers:
                layer.delayed.clear()  # left by a step that an error ended
        for weights in [*self._streams.kept]:
            weights.free()  # their backward did not come
        for _, restored in self._fetched.values():
            restored.release()
        self._fetched.clear()
        self._awaits_backward.clear()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._forget_operations()
        self._hooks, self._chunks, self._forward = [], [], None
