"""Three layers of experts on each rank, the smallest program with all overlaps of training.

Restores run ahead in forward and backward, reduces wait for the tokens' gradients, layouts change
after the gate. Megatron's own loop is in `training.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.layer.experts.gemm import slot_gemm
from megatron_laer.layer.experts.slot_linear import slot_linear
from megatron_laer.life import Kind
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm import layout_index, process_groups
from megatron_laer.runtime.comm.collectives import CountsExchange
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.comm.streams import make_comm_stream
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import Slices
from megatron_laer.runtime.weights.restored import RestoredExperts
from tests.fake_cuda import labels
from tests.fake_cuda.device import Watched, observed
from tests.placed import placed
from tests.races.faults import LAYER_FAULTS, Scene

CARD = labels.card()
LAYERS, STEPS, MICROBATCHES = 3, 3, 2
EXPERTS, CAPACITY, HIDDEN, FFN = 3, 3, 8, 12
TOKENS_C = [4, 0, 2]
HELD = frozenset({Kind.STEP})


class _Tokens(torch.autograd.Function):
    """Exchange of equally many tokens with every rank, asynchronous and waited for at once."""

    @staticmethod
    def forward(ctx: Any, group: Any, tokens: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(tokens)
        work = dist.all_to_all_single(received, tokens.contiguous(), group=group, async_op=True)
        work.wait()
        return received

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, _Tokens.apply(ctx.group, grad)


class Model:
    def __init__(self, scene: Scene, groups: FSEPGroups) -> None:
        algorithm = ExchangeAlgorithm.NODE if scene is Scene.NODE else ExchangeAlgorithm.FLAT
        way = way_of(Geometry(groups.size, EXPERTS, CAPACITY, groups.node_size), algorithm)
        exchange = Exchange(groups, [way])
        self.scene, self.groups = scene, groups
        self.streams = ExchangeStreams(
            exchange,
            parameters=make_comm_stream("parameters", CARD, overlaps=True),
            gradients=make_comm_stream("gradients", CARD, overlaps=True),
        )
        self.layers = [self._new_slices() for _ in range(LAYERS)]
        self.counts = CountsExchange(groups, CARD)
        self.layouts = 0
        self.held: list[RestoredExperts] = []
        self.gemm = slot_gemm("loop")

    def _new_slices(self) -> Slices:
        ranks = self.groups.size
        parameters = tuple(
            torch.nn.Parameter(torch.randn(EXPERTS, rows // ranks, columns, device=CARD))
            for rows, columns in ((FFN, HIDDEN), (HIDDEN, FFN))
        )
        if self.scene is not Scene.AUTOGRAD:
            for parameter in parameters:
                parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        return Slices(parameters, (FFN, HIDDEN))

    def next_index(self) -> Any:
        """Return another layout, the same on every rank."""
        self.layouts += 1
        layout = ExpertLayout.random(self.groups.size, CAPACITY, EXPERTS, seed=(7, self.layouts))
        return layout_index.layout_index(placed(layout), CARD)

    def experts(self) -> list[RestoredExperts]:
        if self.scene is Scene.STEP:
            return self.held
        index = self.next_index()
        passes = [
            RestoredExperts(f"layer {number}", slices, index, self.streams)
            for number, slices in enumerate(self.layers)
        ]
        if self.scene is Scene.REPEATED:
            again = RestoredExperts("layer 1", self.layers[1], self.next_index(), self.streams)
            passes.insert(2, again)
        return passes

    def step(self) -> None:
        if self.scene is Scene.STEP:
            index = self.next_index()
            self.held = self.held or [
                RestoredExperts(f"layer {number}", slices, index, self.streams, HELD)
                for number, slices in enumerate(self.layers)
            ]
            for held in self.held:
                held.begin_step(index, MICROBATCHES)
        for _ in range(MICROBATCHES):
            self.microbatch()
        for held in self.held:
            held.free()
        with torch.no_grad():
            for parameter in (part for slices in self.layers for part in slices.parameters):
                kept = self.scene is not Scene.AUTOGRAD
                grad: Any = parameter.main_grad if kept else parameter.grad  # type: ignore[attr-defined]
                parameter.add_(grad, alpha=-1e-2)
                if kept:
                    grad.zero_()
                parameter.grad = None

    def microbatch(self) -> None:
        """Run forward and backward in the scheduler's order for a chunk."""
        experts = self.experts()
        hidden = torch.randn(sum(TOKENS_C), HIDDEN, device=CARD, requires_grad=True)
        first, last = experts[0], experts[-1]
        first.weights.start_restore()
        first.make_wait()
        for number, restored in enumerate(experts):
            if number:
                restored.previous = experts[number - 1]
            ones = torch.ones(EXPERTS + 2, dtype=torch.int64, device=CARD)
            read_counts = self.counts.start(ones[2:], ones[:2], 0, "layer")
            hidden = torch.tanh(hidden)  # like shared experts during the exchange of counts
            assert (read_counts() == 1).all()
            if self.scene is Scene.FRESH:
                restored.weights.change(self.next_index())
            hidden = restored.dispatch(restored.gate(hidden))
            hidden = _Tokens.apply(self.groups.tokens, hidden)
            if number + 1 < len(experts):
                following = experts[number + 1]
                if following.is_same_layer(restored):
                    restored.weights.hand_on(following.weights)
                else:
                    following.weights.start_restore()
                following.make_wait()
            hidden = _Tokens.apply(self.groups.tokens, self._compute(restored, hidden))
        loss = hidden.sum()
        assert loss.grad_fn is not None
        loss.grad_fn.register_prehook(lambda _: last.weights.start_restore())
        loss.backward()

    def _compute(self, restored: RestoredExperts, tokens: torch.Tensor) -> torch.Tensor:
        first, second = restored.weight_placeholders()
        (tokens,) = restored.before_compute(tokens)
        hidden = slot_linear(tokens, first, restored, 0, TOKENS_C, self.gemm)
        output = slot_linear(torch.relu(hidden), second, restored, 1, TOKENS_C, self.gemm)
        return restored.after_compute(output)


@contextlib.contextmanager
def gloo_groups() -> Iterator[FSEPGroups]:
    """Make groups of all ranks, each rank being a node."""
    dist.init_process_group("gloo")
    try:
        groups = process_groups.create_groups(dist.group.WORLD, 1, dist.new_group)
        yield groups
    finally:
        groups.destroy()
        dist.destroy_process_group()


def watch(scene: Scene, fault: str | None, one_queue: bool) -> Watched:
    """Train in this scene, with a fault or none; return the checker's findings on this rank."""
    torch.manual_seed(0)
    broken = contextlib.nullcontext() if fault is None else LAYER_FAULTS[fault].replaced()
    with gloo_groups() as groups, observed(one_queue=one_queue) as device, broken:
        model = Model(scene, groups)
        for _ in range(STEPS):
            model.step()
        del model
    return device.watched()
