"""LoRA on experts at home: bytes of adapters, checkpoints, and grouped experts.

Rows of the parity table compare it with stock's for experts in a sequence.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_laer.cpu.training import Adapt, Record
from tests.checkpoints import assert_equal
from tests.distributed.conftest import Trainings, train_grouped
from tests.distributed.test_homes import check_exchanged, exchanged_and_expected
from tests.parity.adapted import lora_on_attention
from tests.parity.bridge_lora import (
    RANK,
    adapt_experts,
    lora_on_experts,
    lora_on_experts_under_recompute,
)
from tests.parity.compare import distance
from tests.parity.replay import train_row
from tests.parity.row import FP32_BOUND, REPLICAS_PAY
from tests.parity.rows import DIST_OPT, FAST, FULL_RECOMPUTE
from tests.probes import layouts_in_force, running

HOMES = " --expert-parallel-mode fsep --fsep-sharding experts"
RANDOM = HOMES + " --fsep-planner random"
# Adapters learn little in few steps otherwise.
HIDDEN, WIDTH = 48, 64

shared = partial(adapt_experts, shared=True)


def exchanged_and_sizes(model: Any) -> tuple[Any, list[tuple[int, int]], list[tuple[int, int]]]:
    """Return numbers as for experts without adapters, and sizes of restored and reduced ones."""
    coordinator = running()
    share = coordinator.layers[0].share
    trained = [share.sizes[at] for at in share.trained_at]
    return exchanged_and_expected(model), [*share.sizes], trained


def test_adapters_travel_with_replicas_and_only_their_gradients_go_home(
    trained: Trainings,
) -> None:
    flags = RANDOM + " --fsep-restore step --fsep-set restore_algorithm=flat --bf16"
    flags += " --micro-batch-size 1" + FAST  # four in a step
    of_first, of_second = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
    adapters = [(RANK, HIDDEN), (2 * WIDTH, RANK), (RANK, WIDTH), (HIDDEN, RANK)]
    for record in trained.each(flags, exchanged_and_sizes, lora_on_experts, by=train_row, steps=6):
        for _, restored, reduced in record.probes:
            assert restored == [of_first, *adapters[:2], of_second, *adapters[2:]]
            assert reduced == adapters, "bases are frozen"
        check_exchanged([numbers for numbers, _, _ in record.probes])


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
    trained: Trainings, adapt: Adapt, flags: str
) -> None:
    """Each expert has matrices of its own, or all experts of all ranks share an adapter."""
    stock, homes = (
        trained(mode + FAST, replicas_in_memory, adapt, by=train_grouped, steps=12)
        for mode in (flags.partition(" --fsep")[0], flags + RANDOM)
    )
    assert any(".adapter." in name for name in stock.first_grads)
    assert all(gradient.any() for gradient in homes.first_grads.values())
    assert distance(homes, stock).within(FP32_BOUND)
    assert "--fsep-restore step" in flags or not any(homes.probes), "freed after their backward"


SAVED = DIST_OPT + FAST + " --ckpt-format torch_dist --override-opt_param-scheduler"


def lora_on_attention_and_experts(model: torch.nn.Module) -> None:
    """Adapt both, since Megatron saves no optimizer's state where all dense layers are frozen."""
    lora_on_attention(model)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapt_experts(model)
    for parameter in adapters:
        parameter.requires_grad_()


def test_checkpoints_with_adapters_go_to_stock_and_back(trained: Trainings, tmp_path: Path) -> None:
    def run(mode: str, steps: int, load: str = "", save: str = "") -> Record:
        flags = mode + SAVED + " --dist-ckpt-optim-fully-reshardable"
        flags += f" --load {tmp_path / load}" if load else ""
        flags += f" --save {tmp_path / save} --save-interval {steps}" if save else ""
        record: Record = trained(
            flags, None, lora_on_attention_and_experts, by=train_row, steps=steps
        )
        return record

    stock = run("", 6)
    parts = [
        run(RANDOM, 2, save="homes"),
        run("", 4, load="homes", save="stock"),
        run(RANDOM, 6, load="stock"),
    ]
    journey = Record(
        losses=[loss for part in parts for loss in part.losses],
        grad_norms=[norm for part in parts for norm in part.grad_norms],
        first_grads=parts[0].first_grads,
        weights=parts[-1].weights,
    )
    assert len(journey.losses) == 6
    assert any(".adapter." in name for name in journey.weights)
    assert distance(journey, stock).within(FP32_BOUND)


def test_a_resumed_run_with_adapters_is_bitwise_the_uninterrupted_one(
    trained: Trainings, tmp_path: Path
) -> None:
    planned = f"{HOMES} --fsep-late-plan wait --fsep-set cluster={REPLICAS_PAY}{SAVED}"
    options: dict[str, Any] = {"by": train_row, "steps": 4}
    saves, loads = f" --save {tmp_path} --save-interval 2", f" --load {tmp_path} --ckpt-step 2"
    whole, rest = (
        trained(planned + more, layouts_in_force, lora_on_attention_and_experts, **options)
        for more in (saves, loads)
    )
    assert rest.probes == whole.probes[2:] and rest.probes[-1][0] == 3, "planning goes on"
    assert rest.losses == whole.losses[2:] and rest.grad_norms == whole.grad_norms[2:]
    assert_equal(rest.weights, whole.weights)
