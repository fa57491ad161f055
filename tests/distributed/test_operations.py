"""The first layer of each operation is fetched, or handed on, during the operation before.

Until a step is complete, the order of its operations is not known: the first step shows the times
when every operation fetches for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.training import Record, train
from megatron_laer.planner.layout import ExpertLayout
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.row import FSEP
from tests.parity.rows import FULL_RECOMPUTE, RANDOM, SCHEDULER_OFF
from tests.probes import running, watching

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
    from megatron_laer.runtime.weights.slots import RestoredWeights

    ran: list[Ran] = []

    def begin(*_: Any, **__: Any) -> None:
        ran.append(Ran())

    def note(word: str, weights: Any) -> None:
        ran[-1].events.append((word, weights.name))

    def fetch(weights: Any) -> None:
        if not weights.are_here:
            note("fetches", weights)

    def hand_on(weights: Any, to: Any) -> None:
        if to is not None:
            note("hands on", weights)

    random_layout = Geometry.random_layout

    def with_replicas(geometry: Geometry, seed: tuple[int, ...]) -> ExpertLayout:
        layout = random_layout(geometry, seed)
        return layout if layout.replicas_E.max() > 1 else with_replicas(geometry, (*seed, 0))

    with (
        mock.patch.object(Geometry, "random_layout", with_replicas),
        watching(
            (schedules, "forward_step", begin),
            (schedules, "backward_step", begin),
            (RestoredWeights, "start_restore", fetch),
            (RestoredWeights, "hand_on", hand_on),
            (RestoredWeights, "matrix", lambda weights, *_: note("uses", weights)),
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
    trained: Trainings, size: int, operations: int, extra: str
) -> None:
    for ran in trained.each(FSEP + extra, by=operations_of, size=size, global_batch=16):
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
        The record, and the layers restored after each operation and after each step.
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
    trained: Trainings,
) -> None:
    flags, steps = f"{FSEP}{RANDOM} --num-layers 3", len(ORDERS)
    on, waiting, left = trained(flags, by=train_in_orders, steps=steps)
    off, _, _ = trained(flags + SCHEDULER_OFF, by=train_in_orders, steps=steps)
    assert identical(on, off)
    assert left == [0] * len(ORDERS)
    kept = 1  # layer, whose matrices stay between operations whose order is known
    assert waiting[:4] == [0] * 4  # no order is known
    assert waiting[4:8] == [kept, 0, 0, 0]  # from the second operation on, not as in the first step
    assert waiting[8:12] == [kept, kept, 0, 0]
    assert waiting[12:16] == [kept, kept, kept, 0]
    assert waiting[16:] == [kept, 0, 0, 0]
