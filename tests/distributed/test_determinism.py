"""Bitwise equality of a run and its repetition, recorded and evaluated, and of stock without FSEP.

That a re-run under a checkpoint keeps the first pass's routing is in `test_dispatcher.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_laer.cpu.training import Record, train
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.row import FSEP, HOMES
from tests.probes import layouts_in_force

STEPS = 6


@pytest.mark.parametrize("extra", [" --fsep-node-size 1 --fsep-token-exchange node", HOMES])
def test_a_run_that_waits_for_plans_is_bitwise_the_same_with_evaluations_and_recordings(
    trained: Trainings, tmp_path: Path, extra: str
) -> None:
    flags = f"{FSEP} --fsep-late-plan wait --fsep-planner greedy{extra}"
    recorded = f" --fsep-record {tmp_path} metrics trace layouts"
    plain, evaluated = (
        trained(flags + more, layouts_in_force, steps=STEPS)
        for more in ("", f" --eval-interval 3 --eval-iters 2{recorded}")
    )
    assert len([*tmp_path.iterdir()]) == 3
    assert plain.probes[-1][0] == STEPS - 1, (
        "every step but the first has a plan from the one before"
    )
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


def test_standard_mode_is_megatron_without_the_plugin_to_the_bit(trained: Trainings) -> None:
    without = trained("", by=train_without_plugin, steps=STEPS)
    standard = trained(" --expert-parallel-mode standard", steps=STEPS)
    assert identical(standard, without)
