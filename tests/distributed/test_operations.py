"""The first layer of each operation is fetched, or handed on, during the operation before.

Until a step is complete, the order of its operations is not known: the first step shows the times
when every operation fetches for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.planner.layout import ExpertLayout
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.rows import FULL_RECOMPUTE, RANDOM
from tests.probes import running

STEPS = 3
HOME = RANDOM + " --fsep-sharding experts"
VIRTUAL = (
    " --pipeline-model-parallel-size 2 --num-layers 8 --num-layers-per-virtual-pipeline-stage 2"
)


@dataclass
class Ran:
    """An operation's events, with layers: experts are fetched, used, and handed on afterwards."""

    events: list[tuple[str, str]] = field(default_factory=list)

    @property
    def first(self) -> str:
        return next(layer for word, layer in self.events if word == "uses")

    @property
    def fetches_first(self) -> bool:
        """Return whether this operation fetches the first experts that it uses."""
        return ("fetches", self.first) in self.events[: self.events.index(("uses", self.first))]

    def prepares(self, following: Ran) -> bool:
        """Return whether the first experts of the next operation are fetched or handed on here."""
        fetched = ("fetches", following.first) in self.events
        return fetched or ("hands on", following.first) in self.events


def operations_of(flags: list[str]) -> list[Ran]:
    from megatron.core.pipeline_parallel import schedules

    from megatron_laer.planner.geometry import Geometry
    from megatron_laer.runtime.weights.restored_weights import RestoredWeights
    from megatron_laer.runtime.weights.states import WeightState

    ran: list[Ran] = []

    def operation(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran.append(Ran())
            return run(*args, **kwargs)

        return call

    def told(word: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            fetched = self.state.weights is not WeightState.SHARDED
            if not (fetched if word == "fetches" else args == (None,)):
                ran[-1].events.append((word, self.state.name))
            return method(self, *args)

        return call

    random_layout = Geometry.random_layout

    def with_replicas(geometry: Geometry, seed: tuple[int, ...]) -> ExpertLayout:
        layout = random_layout(geometry, seed)
        return layout if layout.replicas_E.max() > 1 else with_replicas(geometry, (*seed, 0))

    with (
        mock.patch.object(Geometry, "random_layout", with_replicas),
        mock.patch.object(schedules, "forward_step", operation(schedules.forward_step)),
        mock.patch.object(schedules, "backward_step", operation(schedules.backward_step)),
        mock.patch.multiple(
            RestoredWeights,
            start_restore=told("fetches", RestoredWeights.start_restore),
            hand_on=told("hands on", RestoredWeights.hand_on),
            matrix=told("uses", RestoredWeights.matrix),
        ),
    ):
        train(flags)
    return ran


@pytest.mark.parametrize(
    ("size", "operations", "extra"),
    [
        (4, 16, VIRTUAL + RANDOM),
        (4, 16, VIRTUAL + HOME),
        (2, 8, " --num-layers 2" + RANDOM + FULL_RECOMPUTE),
    ],
    ids=["virtual pipeline 2 x 2", "virtual pipeline 2 x 2, experts at home", "no pipeline"],
)
def test_no_operation_but_a_steps_first_fetches_its_own_first_layer(
    ranks: RankPools, text_data: str, size: int, operations: int, extra: str
) -> None:
    flags = command_line(
        text_data,
        " --expert-parallel-mode fsep --fsep-sharding rows" + extra,
        global_batch=16,
        steps=STEPS,
    )
    for ran in ranks(size).run(operations_of, flags):
        assert len(ran) == STEPS * operations
        late = [at for at, each in enumerate(ran) if each.fetches_first]
        assert late == [*range(operations), operations, 2 * operations]
        known = [at for at in range(operations, len(ran)) if at not in late]
        assert all(ran[at - 1].prepares(ran[at]) for at in known)


# Operations of two microbatches, step by step: a letter for forward or backward, and a number.
ORDERS = ("F0 B0 F1 B1", "F0 F1 B0 B1", "F0 F1 B1 B0", "F0 F1 B1 B0", "F0 B0 F1 B1")


def train_in_orders(flags: list[str]) -> tuple[Record, list[int], list[int]]:
    """Train with another order of operations in each step.

    Returns:
        The record, and the restored matrices in use after each operation and after each step.
    """
    from megatron.core.pipeline_parallel import schedules

    orders = iter(ORDERS)
    after_operations: list[int] = []
    after_steps: list[int] = []

    def in_use() -> int:
        return running().streams.weights.in_use

    def own_schedule(*, model: Any, num_microbatches: int, **named: Any) -> list[Any]:
        (chunk,) = model
        config, losses, outputs = schedules.get_model_config(chunk), [], {}
        for word in next(orders).split():
            if word[0] == "F":
                outputs[word[1]], _ = schedules.forward_step(
                    named["forward_step_func"],
                    named["data_iterator"],
                    chunk,
                    num_microbatches,
                    None,
                    losses,
                    config,
                    cp_group_size=1,
                )
            else:
                schedules.backward_step(None, outputs.pop(word[1]), None, config)
            after_operations.append(in_use())
        config.finalize_model_grads_func([chunk], None)
        return losses

    with mock.patch.object(schedules, "forward_backward_no_pipelining", own_schedule):
        record = train(flags, lambda _: after_steps.append(in_use()))
    return record, after_operations, after_steps


def test_another_order_than_that_of_the_last_step_costs_a_restore_and_changes_no_bit(
    ranks: RankPools, text_data: str
) -> None:
    flags = " --expert-parallel-mode fsep --fsep-sharding rows --num-layers 3" + RANDOM
    command = command_line(text_data, flags, global_batch=8, steps=len(ORDERS))
    on, waiting, left = ranks(2).run(train_in_orders, command)[0]
    off, _, _ = ranks(2).run(train_in_orders, [*command, "--fsep-set", "scheduler=off"])[0]
    assert identical(on, off)
    assert left == [0] * len(ORDERS)
    kept = 2  # matrices of one layer, between operations whose order is known
    assert waiting[:4] == [0] * 4  # no order is known
    assert waiting[4:8] == [kept, 0, 0, 0]  # from the second operation on, not as in the first step
    assert waiting[8:12] == [kept, kept, 0, 0]
    assert waiting[12:16] == [kept, kept, kept, 0]
    assert waiting[16:] == [kept, 0, 0, 0]
