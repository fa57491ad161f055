"""Random lives of layers: their weights and gradients, event by event, against a plain account.

The real scheduler drives `RestoredExperts`, as Megatron's schedules do: forwards and backwards of
microbatches in any legal order, through one chunk or two. The kinds of a life are drawn from `Kind`
without a list, so a new kind is tried too. Streams are lazy: they work when something waits for
them, at random, or at once. Memory is poisoned while nothing owns it.

Over 400 lines: the machine and its faults read as one; the group is in `tests/life_sequences.py`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
)
from torch.utils.checkpoint import checkpoint

from megatron_laer.life import Action, Event, Kind, Kinds, column
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.layout_index import LayoutIndex, layout_index
from megatron_laer.runtime.comm.streams import CommStream, StreamTimes, Task
from megatron_laer.runtime.layer_state import LayerState
from megatron_laer.runtime.planning.pass_layouts import LayerPass
from megatron_laer.runtime.scheduler import Chunk, Scheduler
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slots import ExchangeStreams, RestoredWeights, SlotGrads
from megatron_laer.telemetry.activities import Activity
from tests.life_sequences import (
    CPU,
    RANKS,
    SIZES,
    SLOTS,
    GroupExchange,
    Layer,
    Pass,
    Product,
    Stage,
    layouts_of,
    setups,
)
from tests.sequences import Life, find, fitting, rewritten, run_lives

EVENTS_BY_DAY, EVENTS_AT_NIGHT = 1_500, 20_000


class CheckedPool(BufferPool):
    """Pool that refuses a tensor which it has."""

    def put_back(self, tensor: torch.Tensor) -> None:
        free = self._free[tuple(tensor.shape), tensor.dtype, tensor.device]
        assert all(tensor is not other for other in free), "memory is put back twice"
        super().put_back(tensor)


class LazyStream(CommStream):
    """Stream whose work is done when it is waited for, or earlier where `hurries` says so."""

    def __init__(self, name: str, hurries: Callable[[], bool]) -> None:
        self.times = StreamTimes(name, CPU)
        self._hurries = hurries
        self._queue: deque[LazyResult] = deque()

    def submit(self, work: Task, activity: Activity) -> LazyResult:
        self._queue.append(result := LazyResult(self, work))
        if self._hurries():
            self.catch_up()
        return result

    def close(self) -> None:
        self.catch_up()

    def catch_up(self) -> None:
        while self._queue:
            self.do_next()

    @torch.no_grad()
    def do_next(self) -> None:
        if self._queue:
            self._queue.popleft().work()


class LazyResult:
    """Result of a lazy stream's work."""

    def __init__(self, stream: LazyStream, task: Task) -> None:
        self._stream, self._task = stream, task
        self._result: torch.Tensor | None = None

    def work(self) -> None:
        self._result = self._task()

    def wait(self) -> torch.Tensor:
        while self._result is None:
            self._stream.do_next()
        return self._result

    def result(self) -> torch.Tensor:
        assert self._result is not None, "later work runs before this one"
        return self._result


class Part(NamedTuple):
    """Part of a layer with a graph of its own."""

    name: str
    one: Pass
    given: torch.Tensor
    output: torch.Tensor


@dataclass(eq=False)
class Flight:
    """Forward of a microbatch through a chunk, until its backward is over."""

    chunk: int
    handle: object
    hidden: torch.Tensor
    passes: list[Pass] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    grad: torch.Tensor | None = None


class Registered(LayerState):
    """Layer whose restored experts are listed, in `made`."""

    made: list[RestoredExperts]

    def _experts(self, index: LayoutIndex, kinds: Kinds) -> RestoredExperts:
        self.made.append(made := super()._experts(index, kinds))
        return made


_PARTS = ("gate", "dispatch", "experts", "combine")


class LayerLives(Life):
    """Machine of the lives of layers' weights and gradients, as Megatron's schedules make them.

    `fixed` are parts of the setup that are not drawn.
    """

    fixed: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.is_sound = False
        self.in_step = self.may_evaluate = False

    # The life begins, and its steps.

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.setup = setup = data.draw(setups(**self.fixed))
        note(str(setup))
        at_home = Kind.HOMES in setup.kinds
        self.random = random.Random(setup.seed)
        self.layouts = layouts_of(at_home=at_home, may_be_empty=Kind.EMPTY in setup.kinds)
        numbers = sorted({number for chunk in setup.chunks for number in chunk})
        self.layers = [Layer(setup, number) for number in numbers]
        self.bytes_kept = self.layers[0].share.restored_bytes(SLOTS)
        hurries = lambda: self.random.random() < setup.hurries  # noqa: E731
        self.streams = ExchangeStreams(
            GroupExchange(at_home=at_home),
            parameters=LazyStream("parameters", hurries),
            gradients=LazyStream("gradients", hurries),
            most_kept_bytes=setup.kept * self.bytes_kept,
            weights=CheckedPool(),
            grads=CheckedPool(),
            payloads=CheckedPool(),
        )
        self.states = [self._state(number) for number in numbers]
        self.step_layouts = [self.layouts[0]] * len(numbers)
        self.pass_layouts = self._pass_layouts()
        self.scheduler = Scheduler(setup.of_run, self.streams, self.pass_layouts)
        self.chunks = [self._chunk(chunk) for chunk in setup.chunks]
        self.scheduler.attach(self.chunks)
        self.drawn: dict[LayerPass, ExpertLayout] = {}
        self.forward: Flight | None = None
        self.backward: Flight | None = None
        self.awaiting: list[Flight] = []
        self.left = [0] * len(self.chunks)
        self.microbatches = 0
        self.reports = 0
        self.is_sound = True

    def _state(self, number: int) -> Registered:
        layer, nothing = self.layers[number], mock.Mock()
        passes = max(chunk.count(number) for chunk in self.setup.chunks)
        state = Registered(
            index=number,
            name=f"layer {number}",
            number=number,
            is_mtp=False,
            home=nothing,
            geometry=layer.geometry,
            streams=self.streams,
            device=CPU,
            kinds=self.setup.of_run,
            find_share=lambda: layer.share,
            adapters=nothing,
            what_changed=nothing,
            on_step_end=lambda: None,
            launch_kernels=nothing,
            passes=passes,
        )
        state.made = []
        return state

    def _pass_layouts(self) -> Any:
        def layout_for(layer_pass: LayerPass) -> ExpertLayout:
            if self.holds and layer_pass.training:
                return self.step_layouts[layer_pass.layer]
            if layer_pass not in self.drawn:
                self.drawn[layer_pass] = self.random.choice(self.layouts)
            return self.drawn[layer_pass]

        return SimpleNamespace(
            begin_forward=lambda *_: None,
            layout_for=layout_for,
            is_known=lambda _: self.setup.foresees,
        )

    def _chunk(self, numbers: Sequence[int]) -> Chunk:
        def report(_: object) -> None:
            self.reports += 1

        layers = [self.states[number] for number in numbers]
        module = torch.nn.Identity()
        return Chunk(module, layers, [], lambda _: None, lambda: False, None, report)

    @property
    def holds(self) -> bool:
        return Kind.STEP in self.setup.kinds

    @property
    def by_parts(self) -> bool:
        return Kind.PARTS in self.setup.kinds

    @property
    def at_rest(self) -> bool:
        return self.forward is None and self.backward is None

    @property
    def all_is_done(self) -> bool:
        return self.at_rest and not self.awaiting and not any(self.left)

    def step(self, layers: int = 1) -> None:
        """Count the layers to which a rule's event happens."""
        for _ in range(layers):
            super().step()
        self.is_sound = False

    @precondition(lambda self: not self.in_step)
    @rule(
        microbatches=st.sampled_from([1, 2, 2, 3]),
        is_told=st.sampled_from([True, True, True, False]),
    )
    def begin_step(self, microbatches: int, is_told: bool) -> None:
        self.step()
        self._begin_step(microbatches, is_told or self.holds)

    def _begin_step(self, microbatches: int, is_told: bool) -> None:
        self.in_step = self.may_evaluate = True
        self.microbatches = microbatches
        told = microbatches if is_told else None
        self.scheduler.begin_step(told)
        self.drawn.clear()
        self._begin_passes()
        for state in self.states:
            state.begin_step(told)
            layout = self.step_layouts[state.index] = self.random.choice(self.layouts)
            state.begin_layout(layout, told)

    def _begin_passes(self) -> None:
        self.left = [self.microbatches] * len(self.chunks)
        for layer in self.layers:
            layer.zero_grads()
            layer.summed.clear()

    @precondition(lambda self: self.in_step and self.all_is_done)
    @rule(updates=st.sampled_from([True, True, False]))
    def end_step(self, updates: bool) -> None:
        self.step()
        self._end_step(updates=updates)

    @precondition(lambda self: self.in_step and self.at_rest)
    @rule(lifo=st.booleans(), ends=st.booleans())
    def finish_step(self, lifo: bool, ends: bool) -> None:
        """Run all that is left, each forward before its backward, or all forwards first."""
        self._finish(lifo=lifo)
        if ends:
            self._end_step(updates=True)

    def _finish(self, *, lifo: bool = False) -> None:
        while self.in_step and not self.all_is_done:
            self.step()
            if self.backward:
                self._go_on_backward()
            elif self.forward:
                self._go_on_forward()
            elif self.awaiting and not (lifo and any(self.left)):
                self._begin_backward(-1)
            else:
                self._begin_forward(0)

    def _end_step(self, *, updates: bool) -> None:
        self.in_step = False
        self.scheduler.end_step()
        if not updates:
            return  # an optimizer that skips the step leaves held weights valid
        for state in self.states:
            state.end_step()
        assert self.streams.weights.in_use == self.streams.grads.in_use == 0
        for layer in self.layers:
            layer.update()

    @precondition(lambda self: self.in_step and self.at_rest)
    @rule(microbatches=st.sampled_from([1, 2]))
    def leave_step(self, microbatches: int) -> None:
        """Begin the next step where an error has ended this one, some of whose passes are over."""
        self.step()
        self.awaiting.clear()
        self._begin_step(microbatches, is_told=True)

    @precondition(lambda self: self.in_step and self.all_is_done)
    @rule()
    def repeat_step(self) -> None:
        """Run the same passes again, as Megatron's rerun state machine does."""
        self.step()
        self._begin_passes()
        self._finish()

    @rule(parameters=st.booleans(), all_work=st.booleans())
    def stream_goes_on(self, parameters: bool, all_work: bool) -> None:
        self.step()
        stream = self.streams.parameters if parameters else self.streams.gradients
        assert isinstance(stream, LazyStream)
        (stream.catch_up if all_work else stream.do_next)()

    # Forward.

    @precondition(
        lambda self: (
            self.in_step and any(self.left) and not self.forward and self.may_begin_operation
        )
    )
    @rule(chunk=st.integers(0, 1))
    def begin_forward(self, chunk: int) -> None:
        self.step()
        self._begin_forward(chunk)

    @property
    def may_begin_operation(self) -> bool:
        """Return whether no other one is under way, or both run together."""
        return self.by_parts or self.at_rest

    def _begin_forward(self, chunk: int) -> None:
        chunk %= len(self.chunks)
        if not self.left[chunk]:
            chunk = next(at for at, left in enumerate(self.left) if left)
        self.left[chunk] -= 1
        self.may_evaluate = True
        handle = self.scheduler.begin_forward(self.chunks[chunk].module)
        hidden = torch.ones(4, requires_grad=self.setup.inputs_train)
        self.forward = Flight(chunk, handle, hidden)

    @precondition(lambda self: self.forward is not None)
    @rule(
        replan=st.sampled_from([None, None, 0, 1, 2, 3, 4]),
        unused=st.sampled_from([(), (), (0,), (1,), (2,), (1, 2)]),
        times=st.sampled_from([1, 1, 4, 9]),
    )
    def go_on_forward(self, replan: int | None, unused: tuple[int, ...], times: int) -> None:
        """Run the next layers, or parts of them."""
        for _ in range(times):
            if self.forward is not None:
                self.step()
                self._go_on_forward(replan, unused)

    def _go_on_forward(self, replan: int | None = None, unused: tuple[int, ...] = ()) -> None:
        flight = self.forward
        assert flight is not None
        layers = self.chunks[flight.chunk].layers
        plan = partial(self._plan, flight, replan, unused, training=True)
        if self.by_parts:
            self._part(flight, plan)
        else:
            flight.hidden = self._layer(flight.hidden, plan, checkpoints=self.setup.checkpoints)
        done = len(flight.passes)
        if done == len(layers) and len(flight.parts) in (0, done * len(_PARTS)):
            self.scheduler.end_forward()
            self.forward = None
            self.awaiting.append(flight)

    def _plan(
        self,
        flight: Flight,
        replan: int | None,
        unused: Sequence[int],
        *,
        training: bool,
        has_rerun: bool = True,
    ) -> Pass:
        """Plan the next pass, as the planner of microbatches does."""
        state = self.chunks[flight.chunk].layers[len(flight.passes)]
        layer = self.layers[state.index]
        restored = self.scheduler.enter(state, training)
        layer_pass = state.next_pass(training=training)
        if not has_rerun:
            restored.expect_no_backward()
        layout = self.pass_layouts.layout_for(layer_pass)
        if replan is not None and not self.holds:
            layout = self.layouts[replan % len(self.layouts)]
            placed = replace(restored.index.placed, layout=layout)
            restored.change(layout_index(placed, CPU))
        self.scheduler.decided(restored)
        if training:
            state.count_pass(np.zeros((RANKS, layer.geometry.num_experts), dtype=np.int64))
            if has_rerun and not torch.is_grad_enabled():
                restored.expect_rerun()
        grads = {
            at: torch.tensor(self.random.choices(range(-9, 10), k=SLOTS * rows * columns))
            for at, (rows, columns) in enumerate(SIZES)
        }
        shaped = {at: grads[at].view(SLOTS, *SIZES[at]).float() for at in grads}
        shaped |= {at: torch.zeros_like(shaped[at]) for at in unused}
        one = Pass(layer, state, restored, layout, frozenset(unused), shaped)
        flight.passes.append(one)
        return one

    def _layer(
        self, hidden: torch.Tensor, plan: Callable[..., Pass], *, checkpoints: bool = False
    ) -> torch.Tensor:
        made: list[Pass] = []

        def layer(hidden: torch.Tensor) -> torch.Tensor:
            reruns = bool(made)
            if reruns and self.setup.at_block and self.makes_wait_early:
                made[0].restored.make_wait()
            hidden = hidden * 1
            one = made[0] if made else plan(has_rerun=has_rerun)
            made.append(one)
            tokens = one.restored.dispatch(one.restored.gate(hidden, reruns=reruns))
            if tokens.requires_grad and Kind.DELAYED in self.setup.kinds:
                tokens.register_hook(lambda _: self._compute_delayed(one))
            return self._experts(one, tokens)

        has_rerun = not checkpoints or hidden.requires_grad
        if not checkpoints or not has_rerun:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not checkpoints):
                return layer(hidden)
        output: torch.Tensor = checkpoint(
            layer, hidden, use_reentrant=True, preserve_rng_state=False
        )
        return output

    @property
    def makes_wait_early(self) -> bool:
        return Action.MAKE_WAIT in column(self.setup.of_run)[Event.PREPARED]

    def _experts(self, one: Pass, tokens: torch.Tensor) -> torch.Tensor:
        restored = one.restored
        is_training = self.chunks[0].module.training
        self.scheduler.tokens_arrived(one.state, is_training)
        output = tokens * 1
        if one.has_replicas:
            grads = torch.is_grad_enabled() and self.setup.probs_train
            probs = torch.ones(4, requires_grad=grads)
            (output, probs), placeholders = restored.before_compute(tokens, probs)
            for at in range(len(SIZES)):
                if at not in one.unused:
                    output = Product.apply(output, placeholders[at], one, at)
            output = output * probs
        output = restored.after_compute(output)
        one.has_graph = is_training and torch.is_grad_enabled() and output.requires_grad
        return output

    @staticmethod
    def _compute_delayed(one: Pass) -> None:
        """Do as the layer's `backward_dw`."""
        if one.state.delayed:
            one.state.delayed.popleft()()

    def _part(self, flight: Flight, plan: Callable[..., Pass]) -> None:
        name = _PARTS[len(flight.parts) % len(_PARTS)]
        given = flight.hidden.detach().requires_grad_(flight.hidden.requires_grad)
        if name == "gate":
            hidden = given * 1
            one = plan()
            output = one.restored.gate(hidden)
        else:
            one = flight.passes[-1]
            if name == "dispatch":
                output = one.restored.dispatch(given)
            else:
                output = self._experts(one, given) if name == "experts" else given * 1
        flight.parts.append(Part(name, one, given, output))
        flight.hidden = output

    @precondition(lambda self: self.at_rest and self.may_evaluate)
    @rule(chunk=st.integers(0, 1), grads=st.booleans(), replan=st.sampled_from([None, 0, 3, 4]))
    def evaluate(self, chunk: int, grads: bool, replan: int | None) -> None:
        """Run a forward that has no backward."""
        chunk %= len(self.chunks)
        self.step(len(self.chunks[chunk].layers))
        for each in self.chunks:
            each.module.eval()
        with torch.set_grad_enabled(grads):
            handle = self.scheduler.begin_forward(self.chunks[chunk].module)
            flight = Flight(chunk, handle, torch.ones(4, requires_grad=grads))
            plan = partial(self._plan, flight, replan, (), training=False)
            for _ in self.chunks[chunk].layers:
                flight.hidden = self._layer(flight.hidden, plan)
        self.scheduler.end_forward()
        for each in self.chunks:
            each.module.train()
        for one in flight.passes:
            assert not one.restored.weights.are_here
        self.may_evaluate = False  # until something changes

    # Backward.

    @precondition(lambda self: self.awaiting and not self.backward and self.may_begin_operation)
    @rule(which=st.sampled_from([0, 0, -1, -1, 1]))
    def begin_backward(self, which: int) -> None:
        """Run the backward of a microbatch, or begin it."""
        self.step(1 if self.by_parts else len(self.awaiting[which % len(self.awaiting)].passes))
        self._begin_backward(which)

    def _begin_backward(self, which: int) -> None:
        flight = self.backward = self.awaiting.pop(which % len(self.awaiting))
        self.scheduler.begin_backward(flight.handle)
        if not self.by_parts:
            if flight.hidden.requires_grad:
                flight.hidden.sum().backward()
            for one in flight.passes:
                self._left(one)
            self._end_backward()

    @precondition(lambda self: self.by_parts and self.backward is not None)
    @rule(times=st.sampled_from([1, 1, 5, 11]))
    def go_on_backward(self, times: int) -> None:
        """Run the backward of the next parts."""
        for _ in range(times):
            if self.backward is not None:
                self.step()
                self._go_on_backward()

    def _go_on_backward(self) -> None:
        flight = self.backward
        assert flight is not None
        part = flight.parts.pop()
        one = part.one
        if part.name == "weights":
            self._compute_delayed(one)
        elif part.output.requires_grad:
            grad = torch.ones(4) if flight.grad is None else flight.grad
            torch.autograd.backward(part.output, grad)
            flight.grad = part.given.grad
        if part.name == "experts":
            one.stage = Stage.COMPUTED
            flight.parts.append(part._replace(name="weights"))
        if part.name == "dispatch":
            self._left(one)
        if part.name == "gate":
            one.stage = Stage.ARRIVED
        if not flight.parts:
            self._end_backward()

    def _left(self, one: Pass) -> None:
        """Account for a pass whose gradients have left, or are in the step's sums."""
        one.stage = Stage.LEFT
        if not one.has_grads:
            return
        layer = one.layer
        layer.summed.append(one)
        if self.holds and len(layer.summed) < self.microbatches * one.state.passes:
            return
        for each in layer.summed:
            layer.expect({at: each.grads[at] for at in layer.share.trained_at}, each.layout)
        layer.expect_peers(one.layout)
        layer.summed.clear()
        layer.last = one

    def _end_backward(self) -> None:
        flight, self.backward = self.backward, None
        assert flight is not None
        for one in flight.passes:
            one.stage = Stage.ARRIVED
            for weights in {one.restored.weights, one.restored.backward_weights}:
                assert weights not in self.streams.kept, "weights are kept after their backward"
                assert self.holds or not weights.are_here, "weights outlive their backward"
        if self.by_parts and Kind.HOMES in self.setup.kinds and self.setup.has_main_grads:
            expected = sum(one.has_graph and any(self.setup.trained) for one in flight.passes)
            assert self.reports == expected
        self.reports = 0
        for layer in self.layers:
            layer.check_grads()

    # The account of memory.

    @invariant()
    def memory_is_as_long_in_use_as_it_should_be(self) -> None:
        streams = self.streams
        made = [restored for state in self.states for restored in state.made]
        alive = {
            weights
            for restored in made
            for weights in (restored.weights, restored.backward_weights)
            if weights.are_here
        }
        assert streams.weights.in_use == len(alive), "memory has no owner, or two"
        assert streams.payloads.in_use == 0, "payloads outlive their exchange"
        assert sum(streams.kept.values()) <= streams.most_kept_bytes
        assert set(streams.kept) <= alive
        assert streams.grads.in_use == self.num_grads
        if self.at_rest:
            self._check_rest(alive)
        self.is_sound = True

    @property
    def num_grads(self) -> int:
        """Return the buffers of gradients: of passes, and of sums over a step that goes on."""
        number = sum(bool(layer.summed) for layer in self.layers if self.holds)
        for one in self.backward.passes if self.backward else ():
            if one.has_grads:
                number += one.stage is Stage.COMPUTED
                is_sent = not self.holds or one.layer.last is one
                number += one.stage is Stage.LEFT and is_sent
        return number

    def _check_rest(self, alive: set[RestoredWeights]) -> None:
        """Expect weights of passes that wait for their backward, or that come next."""
        awaiting = [one for flight in self.awaiting for one in flight.passes]
        waiting = {one.restored.weights for one in awaiting}
        waiting |= {one.restored.backward_weights for one in awaiting}
        if self.holds:
            return
        assert set(self.streams.kept) <= waiting
        ahead = alive - set(self.streams.kept)
        is_ahead = not self.setup.kinds & {Kind.ALONE, Kind.SYNCHRONISED}
        assert len(ahead) <= is_ahead * (1 + self.by_parts), "too many weights are fetched ahead"

    def teardown(self) -> None:
        """End the life; its memory is free then."""
        if not self.is_sound:
            return  # a failed one, which has its message
        self._finish()
        self._end_step(updates=True)
        self.memory_is_as_long_in_use_as_it_should_be()


def test_random_lives_agree_with_a_plain_account() -> None:
    run_lives(LayerLives, EVENTS_BY_DAY)


@pytest.mark.nightly
def test_many_random_lives_agree_with_a_plain_account() -> None:
    run_lives(LayerLives, EVENTS_AT_NIGHT)


# Deliberate faults of state, which these lives find.


Changes = Mapping[Any, tuple[str, str]]


@dataclass(frozen=True)
class Fault:
    """Deliberate fault: in the source of methods, wrong text takes the place of right text.

    Attributes:
        setup: of lives in which it can show, so that it is found soon.
    """

    name: str
    changes: Changes
    setup: Mapping[str, Any]

    def planted(self) -> ExitStack:
        with ExitStack() as stack:
            for method, texts in self.changes.items():
                stack.enter_context(rewritten(method, *texts))
            return stack.pop_all()


def plain(*kinds: Kind, **others: Any) -> dict[str, Any]:
    """Return a setup of these kinds, whose matrices are all trained."""
    return {"kinds": frozenset(kinds), "trained": (True,) * 3, "has_main_grads": True, **others}


_W, _G, _E = RestoredWeights, SlotGrads, RestoredExperts
_TWICE = ((0, 0),)

FAULTS = (
    Fault(
        "memory is lent again before the restore into it is over",
        {
            _W.start_restore: ("lambda: out)", "lambda: out)\n    self._early = out"),
            _W.used: ("heir._pending, ", "heir._early = self._early; heir._pending, "),
            _W.free: ("pending.wait()", "self._early"),
        },
        plain(Kind.HOMES, Kind.EMPTY, chunks=((0, 1),), hurries=0.0),
    ),
    Fault(
        "weights are handed on twice",
        {_W.used: ("heir, self._heir = self._heir, None", "heir = self._heir")},
        plain(chunks=_TWICE),
    ),
    Fault(
        "weights are handed on, and stay as well",
        {_W.used: ("= self._leave(), False", "= self._pending, False")},
        plain(chunks=_TWICE),
    ),
    Fault(
        "weights are handed on as if they had the heir's layout",
        {_W.used: ("heir.change(index)", "heir.index = index")},
        plain(chunks=_TWICE),
    ),
    Fault(
        "weights count as kept after their backward",
        {_W._leave: ("self._streams.kept.pop(self, None)", "pass")},
        plain(kept=2),
    ),
    Fault(
        "more weights are kept than fit",
        {_W.keep: ("sum(streams.kept.values()) + num_bytes", "sum(streams.kept.values())")},
        plain(kept=0.9),
    ),
    Fault(
        "weights of the layout before stay",
        {_W.change: ("self._submit(Kind.CHANGE, pending.result, before)", "pass")},
        plain(),
    ),
    Fault(
        "a change before the restore is forgotten",
        {_W.change: ("before, self.index = self.index, index", "before = self.index")},
        plain(Kind.FRESH),
    ),
    Fault(
        "a change fetches slots that differ from the new layout",
        {_W.change: ("pending.result, before)", "pending.result, index)")},
        plain(),
    ),
    Fault(
        "a layout without replicas leaves memory behind",
        {_W.change: ("self.free()", "pass")},
        plain(Kind.HOMES, Kind.EMPTY),
    ),
    Fault(
        "matrices are read from the memory before",
        {_W._leave: ("self._pending, None, []", "self._pending, None, self._matrices")},
        plain(),
    ),
    Fault(
        "nothing waits for the reduce",
        {_G.finish_reduce: ("self._arriving.wait()", "pass")},
        plain(hurries=0.0),
    ),
    Fault(
        "delayed gradients are forgotten",
        {_G.compute_delayed: ("compute()", "pass")},
        plain(Kind.PARTS, Kind.DELAYED),
    ),
    Fault(
        "each pass of a step sends its gradients",
        {_E.dispatch: ("sums=Action.SUM in leaves", "sums=False")},
        plain(Kind.STEP),
    ),
    Fault(
        "the second pass of a step overwrites the sum",
        {_G._add: ("add_(", "copy_(")},
        plain(Kind.STEP),
    ),
    Fault(
        "a repeated step ends one pass late",
        {_G._add: ("self._left = self._num_passes ", "self._left = self._num_passes + 1 ")},
        plain(Kind.STEP),
    ),
    Fault(
        "a repeated step never ends",
        {_G._add: ("self._left = self._num_passes ", "pass ")},
        plain(Kind.STEP),
    ),
    Fault(
        "gradients stay in memory once they are summed",
        {_G._add: ("self.free()", "pass")},
        plain(Kind.STEP),
    ),
    Fault(
        "gradients that nothing writes are those of the memory before",
        {_G.receive: ("self.new(position).copy_(grad_CRK)", "self.new(position)")},
        plain(),
    ),
    Fault(
        "backward weights stay where no backward follows",
        {_E.expect_no_backward: ("self.backward_weights.used()", "pass")},
        plain(
            *(Kind.HOMES, Kind.DIRECTIONS),
            chunks=((0,),),
            trained=(False,) * 3,
            inputs_train=False,
            probs_train=False,
        ),
    ),
    Fault(
        "weights of an operation that does not come stay",
        {_E.release: ("self._do(self.life[Event.RELEASED])", "pass")},
        plain(chunks=((0,), (1,)), foresees=True),
    ),
    Fault(
        "backward reads payloads of forward",
        {_E.__init__: ("RestoredWeights(name, share.for_backward", "RestoredWeights(name, share")},
        plain(Kind.HOMES, Kind.DIRECTIONS),
    ),
    Fault(
        "held weights outlive the optimizer's update",
        {_E.free: ("weights.free()", "pass")},
        plain(Kind.STEP),
    ),
    Fault(
        "an evaluation keeps its weights",
        {_E.expect_no_backward: ("self._become({Kind.EVALUATION: True})", "pass")},
        plain(kept=1),
    ),
)


@pytest.mark.parametrize("fault", fitting(FAULTS))
def test_deliberate_faults_of_state_are_found(fault: Fault) -> None:
    """Expect a life to fail, always the same one."""
    lives = type("Lives", (LayerLives,), {"fixed": fault.setup})
    find(lives, fault.planted())
