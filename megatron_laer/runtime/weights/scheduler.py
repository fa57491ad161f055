"""The scheduler carries out the communication schedule: what overlaps what within a model chunk.

Which moments start which exchange is data (`schedule.py`). The scheduler sees the moments: it
follows a chunk's forward passes by hooks on the chunk, a layer tells when its tokens arrived, and
autograd nodes tell about backward. It chooses no layout and moves no weights.

A chunk's forward for one microbatch leaves a chain of `RestoredExperts`, each knowing the layer
before. Backward follows it, whenever the pipeline comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slices import SlicedLayer
from megatron_laer.schedule import Schedule, SchedulePoint, Target


class Layer(SlicedLayer, Protocol):
    """Shows the scheduler all that it knows of a layer."""

    @property
    def recomputes(self) -> bool:
        """Whether its MoE layer is a checkpoint of its own."""
        ...

    @property
    def rerun(self) -> RestoredExperts | None:
        """Return the experts of the next re-run under a checkpoint, if one is to come."""
        ...


@dataclass
class Chunk:
    """Describes a model chunk: the MoE layers that one forward call of it passes, in order.

    Attributes:
        module: called once per microbatch and pass.
        layers: one that a microbatch passes several times is there as often.
        blocks: for each layer, the transformer layer that it belongs to, called with the hidden
            states as its first argument or as `hidden_states`. None where their calls are not to be
            followed: then gradients of layers that recompute are waited for as soon as they leave.
        await_weights: waits until these slices hold this step's weights, which Megatron may still
            be gathering over replicas.
        replayed: gives the experts that the layers' routers are told to choose in the next forward
            pass, int [T, K] each, or None where they choose by themselves; None for a model whose
            routers cannot be told.
    """

    module: torch.nn.Module
    layers: Sequence[Layer]
    blocks: Sequence[torch.nn.Module]
    await_weights: Callable[[Sequence[torch.nn.Parameter]], None]
    replayed: Callable[[], Sequence[torch.Tensor] | None] | None


@dataclass
class _Forward:
    """Follows one forward pass of a chunk."""

    chunk: Chunk
    # The place of the layer that was entered last.
    position: int = -1
    entered: list[RestoredExperts] = field(default_factory=list)

    def next_position(self, layer: Layer) -> int | None:
        """Return the place at which a layer's next pass is; None if the chunk has none."""
        layers = self.chunk.layers
        return next(
            (at for at in range(self.position + 1, len(layers)) if layers[at] is layer), None
        )


class Scheduler:
    """Carries out the schedule on one rank.

    Args:
        experts_of: the experts for a layer's next pass, `training` or not, under the layout that
            was planned for it.
        before_forward: called with the chunk, before it is planned what its forward begins with.
    """

    def __init__(
        self,
        schedule: Schedule,
        streams: ExchangeStreams,
        experts_of: Callable[[Any, bool], RestoredExperts],
        before_forward: Callable[[Chunk], None],
    ) -> None:
        self._schedule = schedule
        self._streams = streams
        self._experts_of = experts_of
        self._before_forward = before_forward
        self._chunks: list[Chunk] = []
        self._hooks: list[Any] = []
        self._forward: _Forward | None = None
        # The experts of a layer that comes next, perhaps on their way, by its index in the chunk.
        self._ahead: dict[int, RestoredExperts] = {}

    def attach(self, chunks: Sequence[Chunk]) -> None:
        """Follow the forward passes of these chunks, and of no others."""
        self._detach()
        self._chunks = list(chunks)
        for chunk in self._chunks:
            # The module keeps its hooks and they keep the chunk: a cycle, which `_detach` breaks.
            self._hooks += [
                chunk.module.register_forward_pre_hook(_call(self._begin_forward, chunk)),
                chunk.module.register_forward_hook(_call(self._end_forward)),
            ]
            if self._schedule.delays_gradients and chunk.blocks:
                layer_of = dict(zip(chunk.blocks, chunk.layers, strict=True))
                self._hooks += [
                    block.register_forward_pre_hook(
                        partial(self._begin_block, layer), with_kwargs=True
                    )
                    for block, layer in layer_of.items()
                ]

    @property
    def replays_routing(self) -> bool:
        """Tell whether the routers of the chunks that are followed can be told what to choose."""
        return any(chunk.replayed is not None for chunk in self._chunks)

    def close(self) -> None:
        """Let go of the chunks and end the communication streams."""
        self._detach()
        self._streams.close()

    def enter(self, layer: Layer, training: bool) -> RestoredExperts:
        """Return the experts of a layer whose forward begins, perhaps already on their way.

        Not for the re-run of a checkpoint, which has those of its first pass.
        """
        forward = self._forward
        position = None if forward is None else forward.next_position(layer)
        if forward is None or position is None:
            return self._experts_of(layer, training)
        restored = self._ahead.pop(position, None) or self._experts_of(layer, training)
        prefetches = self._schedule.target(SchedulePoint.COMBINE_GRADIENT) is Target.PREVIOUS
        if forward.entered and (prefetches or restored.is_same_layer(forward.entered[-1])):
            restored.prefetch_in_backward(forward.entered[-1])
        forward.entered.append(restored)
        forward.position = position
        return restored

    def decided(self, layer: Layer, restored: RestoredExperts) -> None:
        """Start the restore of a pass whose layout is decided: it need not wait for the call."""
        if self._schedule.restores and self._forward is not None:
            self._forward.chunk.await_weights(layer.slices.parameters)
            restored.start_restore()

    def dispatched(self, layer: Layer, training: bool) -> None:
        """Start what may start now that a layer's tokens arrived."""
        forward = self._forward  # none in the re-run of a checkpoint, which happens in backward
        if forward is None or not forward.entered:
            return
        if forward.chunk.layers[forward.position] is layer:
            starts = self._schedule.target(SchedulePoint.DISPATCHED) is Target.NEXT
            self._announce(forward.position + 1, training, starts)

    # Inside.

    def _announce(self, position: int, training: bool, starts: bool) -> None:
        """Prepare the layer that comes next: start its restore, if `starts`.

        Its gradients' place in backward is taken either way.
        """
        assert self._forward is not None
        chunk, entered = self._forward.chunk, self._forward.entered
        if position >= len(chunk.layers):
            return
        layer = chunk.layers[position]
        restored = self._experts_of(layer, training)
        if entered and entered[-1].is_same_layer(restored):
            entered[-1].hand_on(restored)
        elif starts:
            chunk.await_weights(layer.slices.parameters)
            restored.start_restore()
        delays = self._schedule.delays_gradients and not layer.recomputes
        if training and torch.is_grad_enabled() and delays:
            restored.wait_for_grads_here()
        self._ahead[position] = restored

    def _begin_forward(self, chunk: Chunk) -> None:
        self._ahead.clear()
        self._before_forward(chunk)
        self._forward = _Forward(chunk)
        starts = self._schedule.target(SchedulePoint.CHUNK_FORWARD) is Target.FIRST
        self._announce(0, chunk.module.training, starts)

    def _begin_block(
        self,
        layer: Layer,
        block: torch.nn.Module,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Under a checkpoint, wait for the layer's gradients after the block's backward."""
        if not (block.training and torch.is_grad_enabled()):
            return None
        if self._forward is None:
            restored = layer.rerun
        elif layer.recomputes and (position := self._forward.next_position(layer)) is not None:
            restored = self._ahead.get(position)
        else:
            restored = None
        if restored is None:
            return None
        if inputs:
            return (restored.wait_for_grads_after_block(inputs[0]), *inputs[1:]), named
        marked = restored.wait_for_grads_after_block(named["hidden_states"])
        return inputs, named | {"hidden_states": marked}

    def _end_forward(self, output: Any) -> None:
        forward, self._forward = self._forward, None
        assert forward is not None
        if (
            self._schedule.target(SchedulePoint.CHUNK_BACKWARD) is Target.LAST
            and forward.entered
            and isinstance(output, torch.Tensor)
            and output.grad_fn is not None
        ):
            last = forward.entered[-1]
            output.grad_fn.register_prehook(lambda _: last.start_backward_restore())

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._chunks = [], []
        self._forward = None
        self._ahead.clear()


def _call(function: Callable[..., None], *bound: Any) -> Callable[..., None]:
    """Make a module hook that passes on the bound arguments, and a forward hook's output."""

    def hook(_module: torch.nn.Module, _inputs: Any, *output: Any) -> None:
        function(*bound, *output)

    return hook
