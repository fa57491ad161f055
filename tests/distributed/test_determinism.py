"""Bitwise equality of reruns, runs with and without evaluation, and stock without FSEP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.files.records import header_line
from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.row import AT_HOME, HOMES
from tests.records import records_of, taken_apart

STEPS = 6
WAIT = " --fsep-planner {} --fsep-late-plan wait"


def layout_version(model: object) -> int:
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    return -1 if coordinator is None else coordinator.layouts.version


@pytest.fixture
def run(ranks: RankPools, text_data: str) -> Callable[[str], Record]:
    def run_with(extra: str) -> Record:
        flags = command_line(text_data, extra, global_batch=8, steps=STEPS)
        record: Record = ranks(2).run(train, flags, layout_version)[0]
        assert len(record.losses) == STEPS
        return record

    return run_with


@pytest.mark.parametrize(
    "planner",
    [
        "greedy",
        "laer --fsep-set split=even",
        "greedy --fsep-node-size 1 --fsep-token-exchange node",
        "greedy" + HOMES,
    ],
)
def test_two_runs_that_wait_for_plans_are_bitwise_equal(
    run: Callable[[str], Record], planner: str
) -> None:
    first, second = (
        run(" --expert-parallel-mode fsep --fsep-sharding rows" + WAIT.format(planner))
        for _ in range(2)
    )
    assert first.probes[-1] == STEPS - 1, "every step but the first has a plan from the one before"
    assert identical(first, second)


@pytest.mark.parametrize(
    "planner",
    ["random", "laer --fsep-set cluster=cpu-gloo --fsep-late-plan wait", "random" + AT_HOME],
)
def test_evaluation_changes_no_later_loss(run: Callable[[str], Record], planner: str) -> None:
    fsep = f" --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner {planner}"
    with_evaluation = run(fsep + " --eval-interval 3 --eval-iters 2")
    without = run(fsep)
    assert len(with_evaluation.eval_losses) >= 3
    assert identical(with_evaluation, without)


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


def test_a_bad_recording_is_refused_on_every_rank(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    flags = partial(command_line, text_data, steps=3)
    fsep = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-set cluster=cpu-gloo"
    recorded = f"{fsep} --fsep-planner laer --fsep-late-plan wait --fsep-record {tmp_path} layouts"
    ranks(2).run(train, flags(recorded))
    path = LAYOUTS.path(tmp_path, 0)
    header, first, *_ = records_of(path)
    fields, _ = taken_apart(path)
    other_experts = header_line(LAYOUTS.name, fields | {"num_experts": 16})
    spoilt = [
        (other_experts, "this run would write"),
        (header + first[:-1] + b"x" + first, "record 2 at byte"),
        (header + first[:3] + b"x" + first[4:], "record 1 at byte"),
    ]
    for written, message in spoilt:
        path.write_bytes(written)
        for result in ranks(2).run_raw(train, flags(recorded)):
            assert result.type_name == "RefusedError", message
            assert message in result.message
            assert path.name in result.message


def test_one_groups_bad_recording_stops_the_other_groups_too(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    flags = partial(command_line, text_data, global_batch=8, steps=3)
    fsep = " --expert-parallel-mode fsep --fsep-sharding rows"
    (tmp_path / "group-1.layouts").write_text("{}")
    for result in ranks(4).run_raw(train, flags(f"{fsep} --fsep-record {tmp_path} layouts")):
        assert result.type_name == "RefusedError"
        assert "rank 2" in result.message
        assert "group-1.layouts" in result.message


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
