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
        blocks: for each layer, the transformer layer that it belongs to, called with the hidden
            states as its first argument or as `hidden_states`. None where their calls are not to be
            followed: then gradients of layers that recompute are waited for as soon as they leave.
        await_weights: waits until these slices hold this step's weights, which Megatron may still
            be gathering over replicas.
    """

    module: torch.nn.Module
    layers: Sequence[Layer]
    blocks: Sequence[torch.nn.Module]
    await_weights: Callable[[Sequence[torch.nn.Parameter]], None]


@dataclass
class _Forward:
    """Follows one forward pass of a chunk."""

    chunk: Chunk
    entered: list[RestoredExperts] = field(default_factory=list)


class Scheduler:
    """Carries out the schedule on one rank.

    Args:
        experts_of: the experts for a layer's next pass, `training` or not, under the layout that
            was planned for it.
    """

    def __init__(
        self,
        schedule: Schedule,
        streams: ExchangeStreams,
        experts_of: Callable[[Any, bool], RestoredExperts],
    ) -> None:
        self._schedule = schedule
        self._streams = streams
        self._experts_of = experts_of
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
                self._hooks += [
                    block.register_forward_pre_hook(
                        partial(self._begin_block, position, layer), with_kwargs=True
                    )
                    for position, (layer, block) in enumerate(
                        zip(chunk.layers, chunk.blocks, strict=True)
                    )
                ]

    def close(self) -> None:
        """Let go of the chunks and end the communication streams."""
        self._detach()
        self._streams.close()

    def enter(self, layer: Layer, training: bool) -> RestoredExperts:
        """Return the experts of a layer whose forward begins, perhaps already on their way.

        Not for the re-run of a checkpoint, which has those of its first pass.
        """
        forward = self._forward
        position = self._position(layer)
        if forward is None or position is None:
            return self._experts_of(layer, training)
        restored = self._ahead.pop(position, None) or self._experts_of(layer, training)
        if (
            self._schedule.target(SchedulePoint.COMBINE_GRADIENT) is Target.PREVIOUS
            and forward.entered
        ):
            restored.prefetch_in_backward(forward.entered[-1])
        forward.entered.append(restored)
        return restored

    def decided(self, layer: Layer, restored: RestoredExperts) -> None:
        """Start the restore of a pass whose layout is decided: it need not wait for the call."""
        if self._schedule.restores and self._forward is not None:
            self._forward.chunk.await_weights(layer.slices.parameters)
            restored.start_restore()

    def dispatched(self, layer: Layer, training: bool) -> None:
        """Start what may start now that a layer's tokens arrived."""
        position = self._position(layer)
        if position is not None:
            starts = self._schedule.target(SchedulePoint.DISPATCHED) is Target.NEXT
            self._announce(position + 1, training, starts)

    # Inside.

    def _position(self, layer: Layer) -> int | None:
        """Return the layer's place in the chunk that is running forward; None outside of one.

        The re-run of a checkpoint is outside: it happens in backward.
        """
        if self._forward is None:
            return None
        layers = self._forward.chunk.layers
        return next((at for at, other in enumerate(layers) if other is layer), None)

    def _announce(self, position: int, training: bool, starts: bool) -> None:
        """Prepare the layer that comes next: start its restore, if `starts`.

        Its gradients' place in backward is taken either way.
        """
        assert self._forward is not None
        chunk = self._forward.chunk
        if position >= len(chunk.layers):
            return
        layer = chunk.layers[position]
        restored = self._experts_of(layer, training)
        if starts:
            chunk.await_weights(layer.slices.parameters)
            restored.start_restore()
        delays = self._schedule.delays_gradients and not layer.recomputes
        if training and torch.is_grad_enabled() and delays:
            restored.wait_for_grads_here()
        self._ahead[position] = restored

    def _begin_forward(self, chunk: Chunk) -> None:
        self._ahead.clear()
        self._forward = _Forward(chunk)
        starts = self._schedule.target(SchedulePoint.CHUNK_FORWARD) is Target.FIRST
        self._announce(0, chunk.module.training, starts)

    def _begin_block(
        self,
        position: int,
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
        else:
            restored = self._ahead.get(position) if layer.recomputes else None
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
