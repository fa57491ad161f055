"""Restores never read parameters that the distributed optimizer is still gathering.

With `--overlap-param-gather`, Megatron waits for them in a hook before their module's call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from tests.parity.compare import Distance, distance
from tests.parity.flags import command_line
from tests.parity.row import AT_HOME
from tests.parity.rows import DIST_OPT

STEPS = 10
CLOSE = Distance(grads=1e-6, losses=1e-5, norms=1e-4, weights=1e-4)


def train_without_call(command: list[str]) -> Record:
    """Run the experts' forward without their call, so without Megatron's hook before it."""
    from megatron_laer.layer.experts.module import FSEPExperts
    from megatron_laer.layer.moe_layer import FSEPMoELayer

    compute = FSEPMoELayer.routed_experts_compute

    def bypass_call(self: Any, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        with mock.patch.object(FSEPExperts, "__call__", FSEPExperts.forward):
            return compute(self, hidden_states, probs)

    with mock.patch.object(FSEPMoELayer, "routed_experts_compute", bypass_call):
        return train(command)


def train_without_waiting(command: list[str]) -> Record:
    """Restore the next layer without checking whether its weights are there."""
    from megatron_laer.plugin import steps

    with mock.patch.object(steps, "_await_weights", lambda wrapped, parameters: None):
        return train(command)


@pytest.mark.parametrize(
    ("scheduler", "sharding", "train_unguarded"),
    [
        ("off", "", train_without_call),
        # Replicas are fetched before stock's modules are called.
        ("on", AT_HOME, train_without_waiting),
    ],
    ids=["off", "experts at home"],
)
def test_the_guard_is_what_keeps_restored_weights_fresh(
    ranks: RankPools,
    text_data: str,
    scheduler: str,
    sharding: str,
    train_unguarded: Callable[[list[str]], Record],
) -> None:
    def command(extra: str) -> list[str]:
        return command_line(text_data, DIST_OPT + extra, global_batch=8, steps=STEPS)

    fsep = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner random"
    fsep += f" --fsep-set scheduler={scheduler}{sharding}"
    pool = ranks(4)
    stock = pool.run(train, command(""))[0]
    unguarded = pool.run(train_unguarded, command(fsep))[0]
    guarded = pool.run(train, command(fsep))[0]
    print(f"\n  unguarded {distance(unguarded, stock)}\n  guarded   {distance(guarded, stock)}")
    assert distance(unguarded, stock).losses > 10 * CLOSE.losses, "the guard guards nothing"
    assert distance(guarded, stock).within(CLOSE)
