"""LoRA on experts at home: bytes of adapters, checkpoints, and grouped experts.

Rows of the parity table compare it with stock's for experts in a sequence.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Adapt, Record, train
from tests.distributed.test_home_names import train_some
from tests.distributed.test_homes import exchanged_and_expected
from tests.parity.bridge_lora import (
    RANK,
    adapt_experts,
    lora_on_attention_and_experts,
    lora_on_experts,
    lora_on_experts_under_recompute,
)
from tests.parity.compare import distance
from tests.parity.flags import command_line
from tests.parity.row import FP32_BOUND
from tests.parity.rows import DIST_OPT, FAST, FULL_RECOMPUTE
from tests.probes import running

HOMES = " --expert-parallel-mode fsep --fsep-sharding experts"
RANDOM = HOMES + " --fsep-planner random"
# Adapters learn little in few steps otherwise.
HIDDEN, WIDTH = 48, 64

shared = partial(adapt_experts, shared=True)


def command(data: str, extra: str, steps: int) -> list[str]:
    return command_line(data, extra + FAST, expert_parallel=2, global_batch=8, steps=steps)


def exchanged_and_sizes(model: Any) -> tuple[Any, list[tuple[int, int]], list[tuple[int, int]]]:
    """Return numbers as for experts without adapters, and sizes of restored and reduced ones."""

    coordinator = running()
    share = coordinator.layers[0].share
    sizes = [*zip(share.rows, share.columns, strict=True)]
    return exchanged_and_expected(model), sizes, [sizes[at] for at in share.trained_at]


def test_adapters_travel_with_replicas_and_only_their_gradients_go_home(
    ranks: RankPools, text_data: str
) -> None:
    flags = RANDOM + " --fsep-restore step --fsep-set restore_algorithm=flat --bf16"
    flags += " --micro-batch-size 1"  # four in a step
    of_first, of_second = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
    adapters = [(RANK, HIDDEN), (2 * WIDTH, RANK), (RANK, WIDTH), (HIDDEN, RANK)]
    runs = ranks(2).run(
        train, command(text_data, flags, 6), exchanged_and_sizes, None, lora_on_experts
    )
    for record in runs:
        before = [0] * 4
        for (counted, expected, in_memory), restored, reduced in record.probes:
            assert restored == [of_first, *adapters[:2], of_second, *adapters[2:]]
            assert reduced == adapters, "bases are frozen"
            assert [now - then for now, then in zip(counted, before, strict=True)] == expected
            assert in_memory == len(restored) * expected[0]
            before = counted
        assert before[0] >= 4 and min(before) > 0


def replicas_in_memory(_: object) -> int:
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    return 0 if coordinator is None else coordinator.streams.weights.in_use


@pytest.mark.parametrize(
    ("adapt", "flags"),
    [
        (adapt_experts, DIST_OPT),
        (lora_on_experts_under_recompute, FULL_RECOMPUTE + " --fsep-restore step"),
        (shared, " --calculate-per-token-loss"),
    ],
    ids=["own", "own, recompute, held over a step", "shared, per-token loss"],
)
def test_adapters_of_grouped_experts_train_as_stocks(
    ranks: RankPools, text_data: str, adapt: Adapt, flags: str
) -> None:
    """Each expert has matrices of its own, or all experts of all ranks share an adapter."""

    def run(mode: str) -> Record:
        stock_flags = flags if mode else flags.partition(" --fsep")[0]
        given = command(text_data, stock_flags + mode, 12)
        found: Record = ranks(2).run(train_some, given, replicas_in_memory, True, adapt)[0]
        return found

    stock, homes = run(""), run(RANDOM)
    assert any(".adapter." in name for name in stock.first_grads)
    assert all(gradient.any() for gradient in homes.first_grads.values())
    assert distance(homes, stock).within(FP32_BOUND)
    assert "--fsep-restore step" in flags or not any(homes.probes), "freed after their backward"


def test_checkpoints_with_adapters_go_to_stock_and_back(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    def run(mode: str, steps: int, load: str = "", save: str = "") -> Record:
        flags = mode + DIST_OPT + " --override-opt_param-scheduler --ckpt-format torch_dist"
        flags += f" --load {tmp_path / load}" if load else ""
        flags += f" --save {tmp_path / save} --save-interval {steps}" if save else ""
        given = command(text_data, flags, steps)
        found: Record = ranks(2).run(train, given, None, None, lora_on_attention_and_experts)[0]
        return found

    stock = run("", 12)
    parts = [
        run(RANDOM, 4, save="homes"),
        run("", 8, load="homes", save="stock"),
        run(RANDOM, 12, load="stock"),
    ]
    journey = Record(
        losses=[loss for part in parts for loss in part.losses],
        grad_norms=[norm for part in parts for norm in part.grad_norms],
        first_grads=parts[0].first_grads,
        weights=parts[-1].weights,
    )
    assert len(journey.losses) == 12
    assert distance(journey, stock).within(FP32_BOUND)
