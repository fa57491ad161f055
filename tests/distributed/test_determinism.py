"""Bitwise equality of a run and its repetition with evaluations, and of stock without FSEP."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.row import HOMES
from tests.probes import layout_version

STEPS = 6


@pytest.mark.parametrize(
    "planner",
    [
        "greedy",
        "laer --fsep-set split=even cluster=cpu-gloo",
        "greedy --fsep-node-size 1 --fsep-token-exchange node",
        "greedy" + HOMES,
    ],
)
def test_a_run_that_waits_for_plans_is_bitwise_the_same_with_evaluations(
    ranks: RankPools, text_data: str, planner: str
) -> None:
    fsep = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-late-plan wait"
    flags = command_line(text_data, f"{fsep} --fsep-planner {planner}", global_batch=8, steps=STEPS)
    plain: Record = ranks(2).run(train, flags, layout_version)[0]
    evaluations = "--eval-interval 3 --eval-iters 2".split()
    evaluated: Record = ranks(2).run(train, [*flags, *evaluations], layout_version)[0]
    assert plain.probes[-1] == STEPS - 1, "every step but the first has a plan from the one before"
    assert len(evaluated.eval_losses) >= 3
    assert identical(evaluated, plain)


def train_without_plugin(flags: list[str]) -> Record:
    from megatron_laer import plugin

    plugin.uninstall()
    assert plugin.patch_table() == ""
    try:
        return train(flags)
    finally:
        plugin.install()


def test_standard_mode_is_megatron_without_the_plugin_to_the_bit(
    ranks: RankPools, text_data: str
) -> None:
    flags = command_line(text_data, global_batch=8, steps=STEPS)
    without = ranks(2).run(train_without_plugin, flags)[0]
    standard = ranks(2).run(train, [*flags, "--expert-parallel-mode", "standard"])[0]
    assert identical(standard, without)


def train_with_fickle_router(flags: list[str]) -> Record:
    """Train with a router that decides otherwise when a checkpoint runs it again."""
    from unittest import mock

    import torch
    from megatron.core.tensor_parallel.random import is_checkpointing

    from megatron_laer.layer.moe_layer import FSEPMoELayer

    route = FSEPMoELayer.route
    flips = 0

    def fickle(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal flips
        probs, routing_map = route(self, *args, **kwargs)
        if torch.is_grad_enabled() and is_checkpointing():
            flips += 1
            routing_map = routing_map.roll(1, dims=1)
        return probs, routing_map

    with mock.patch.object(FSEPMoELayer, "route", fickle):
        record = train(flags)
    assert flips > 0
    return record


def test_a_rerun_under_a_checkpoint_keeps_the_first_passes_routing(
    ranks: RankPools, text_data: str
) -> None:
    recompute = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 2"
    flags = command_line(
        text_data,
        " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner random" + recompute,
        global_batch=8,
        steps=5,
    )
    steady = ranks(2).run(train, flags)[0]
    fickle = ranks(2).run(train_with_fickle_router, flags)[0]
    assert identical(steady, fickle)
