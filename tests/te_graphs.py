"""Calls that replace Transformer Engine's CUDA graphs, so that ranks on the CPU follow their path.

Megatron's own loop captures and replays. Instead of graphs it gets functions that run the captured
calls, as one autograd node each. As with graphs, outputs go to the same memory at every call, which
is another's after the backward. Of Python's effects only those of the capture last. Like
Transformer Engine, they accept no layer with hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import islice
from typing import Any
from unittest import mock

import torch

from megatron_laer.cpu.training import Record, train


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Let torch and Megatron take the block for a capture, of a forward or a backward graph."""
    from megatron.core.transformer import cuda_graphs

    cuda_graphs._set_capture_start()
    try:
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            yield
    finally:
        cuda_graphs._set_capture_end()


class Graph:
    """Replacement of the graph of one layer, or of its captured part."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.replays = 0
        self._parameters = [
            parameter
            for part in layer._get_submodules_under_cudagraphs()
            for parameter in part.parameters()
        ]
        self._buffers: list[torch.Tensor] = []

    def __call__(self, hidden: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
        self.replays += 1
        del tensors["is_first_microbatch"]
        outputs: tuple[torch.Tensor, ...] = _Node.apply(self, tensors, hidden, *self._parameters)
        return outputs

    def capture(self, hidden: torch.Tensor, tensors: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Run the captured part; during capture, Megatron stops there."""
        with capturing():
            found: tuple[torch.Tensor, ...] = self.layer._te_cuda_graph_capture(hidden, **tensors)
            return found

    def replay(self, hidden: torch.Tensor, tensors: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Run the captured part, and undo what it sets in Python, as a graph would not run that."""
        parts = [*self.layer.modules()]
        if dispatcher := getattr(self.layer.mlp, "token_dispatcher", None):
            parts += [dispatcher, getattr(dispatcher, "_comm_manager", dispatcher)]
        before = [(vars(part), vars(part).copy()) for part in parts]
        try:
            return self.capture(hidden, tensors)
        finally:
            for attributes, old in before:
                attributes.clear()
                attributes.update(old)

    def keep(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy outputs to the fixed memory of replays."""
        if not self._buffers:
            self._buffers = [torch.empty_like(output) for output in outputs]
        for buffer, output in zip(self._buffers, outputs, strict=True):
            buffer.copy_(output)
        return self._buffers

    def backward_dw(self) -> None:
        """Compute delayed weight gradients of the captured part, as Transformer Engine's graph."""
        modules = {module.name for module in self.layer.config.cuda_graph_modules}
        if self.layer.is_moe_layer and "moe_router" in modules:
            self.layer.mlp.backward_dw(routed_experts=False, shared_experts=True)
        if "attn" in modules:
            self.layer.self_attention.backward_dw()

    def lose(self) -> None:
        """Overwrite the outputs, whose memory other graphs use once this backward has run."""
        for buffer in self._buffers:
            buffer.fill_(float("nan") if buffer.is_floating_point() else 1)

    def reset(self) -> None:
        self._buffers.clear()


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graph: Graph, tensors: dict[str, Any], hidden: torch.Tensor, *parameters: Any
    ) -> tuple[torch.Tensor, ...]:
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            outputs = graph.replay(hidden, tensors)
        ctx.graph, ctx.inputs, ctx.outputs = graph, (hidden, *parameters), outputs
        kept = [buffer.detach() for buffer in graph.keep(outputs)]
        ctx.mark_non_differentiable(*(out for out in kept if not out.is_floating_point()))
        return tuple(kept)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        pairs = [pair for pair in zip(ctx.outputs, grads, strict=True) if pair[0].requires_grad]
        with capturing():
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [part for part in ctx.inputs if part.requires_grad],
                [grad for _, grad in pairs],
                allow_unused=True,
            )
        ctx.graph.lose()
        left = iter(found)
        return (None, None, *(next(left) if part.requires_grad else None for part in ctx.inputs))


def _make_graphs(
    layers: Sequence[Any],
    inputs: Sequence[Any],
    sample_kwargs: Sequence[Any],
    *,
    _num_layers_per_chunk: Sequence[int] | None = None,
    **_: Any,
) -> list[Graph]:
    """Replace `transformer_engine.pytorch.graph.make_graphed_callables`.

    Its order is by chunk, then microbatch, then layer of the chunk.
    """
    for layer in layers:
        if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks:
            raise RuntimeError("Modules must not have hooks registered at the time they are passed")
    repeats = len(inputs) // len(layers)
    left = iter(layers)
    chunks = [[*islice(left, size)] for size in _num_layers_per_chunk or [len(layers)]]
    graphs = [Graph(layer) for chunk in chunks for _ in range(repeats) for layer in chunk]
    token = makes.set(True)
    for graph, (hidden,), tensors in zip(graphs, inputs, sample_kwargs, strict=True):
        # Megatron's samples are in bf16 for any model.
        graph.capture(hidden.to(next(graph.layer.parameters()).dtype), tensors)
    makes.reset(token)
    made.extend(graphs)
    return graphs


made: list[Graph] = []
# True while graphs are captured with samples.
makes: ContextVar[bool] = ContextVar("makes", default=False)


@contextlib.contextmanager
def graphs_replaced() -> Iterator[list[Graph]]:
    """Let Megatron capture on the CPU; yield the graphs that it makes."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import cuda_graphs
    from megatron.core.transformer.module import GraphableMegatronModule
    from megatron.core.transformer.transformer_layer import TransformerLayer

    def plain_tracker(_te: bool = False, inference: bool = False, *_: Any, **options: Any) -> None:
        tracker(False, inference, False, **options)

    tracker = random.initialize_rng_tracker
    made.clear()
    with (
        mock.patch.object(cuda_graphs, "HAVE_TE_GRAPHS", True),
        mock.patch.object(cuda_graphs, "make_graphed_callables", _make_graphs, create=True),
        mock.patch.object(cuda_graphs, "is_te_min_version", lambda *_: True),
        mock.patch.object(random, "initialize_rng_tracker", plain_tracker),
        # Megatron's own adds a missing mask, for which it imports Transformer Engine.
        mock.patch.object(
            TransformerLayer,
            "_get_te_cuda_graph_replay_args",
            GraphableMegatronModule._get_te_cuda_graph_replay_args,
        ),
    ):
        yield made


def train_graphed(flags: list[str], probe: Callable[..., Any] | None = None) -> tuple[Record, int]:
    """Train with calls for graphs; return the record and the number of replays. Collective."""
    with graphs_replaced() as graphs:
        record = train(flags, probe)
        return record, sum(graph.replays for graph in graphs)
