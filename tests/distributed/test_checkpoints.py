"""Checkpoints hold stock's names and shapes: either side loads what the other saved, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.parity.flags import command_line
from tests.parity.training import initial_weights, train
from tests.parity.weights import Tensors
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

FSEP = " --expert-parallel-mode fsep --fsep-planner static"
WEIGHTS_ONLY = " --no-load-optim --no-load-rng --finetune"


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """Every tensor, bit for bit."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("ffn", [64, 10], ids=["even rows", "uneven rows"])
def test_weights_go_from_stock_to_fsep_and_back(
    ranks: Callable[[int], RankPool], text_data: str, tmp_path: Path, ffn: int
) -> None:
    def command(expert_parallel: int, extra: str) -> list[str]:
        return command_line(
            text_data,
            experts=8,
            expert_parallel=expert_parallel,
            global_batch=8,
            steps=2,
            extra=f" --ffn-hidden-size {ffn} --ckpt-format torch_dist" + extra,
        )

    first, second = tmp_path / "stock", tmp_path / "fsep"
    save = " --save {} --save-interval 2"
    saved = ranks(2).run(train, command(2, save.format(first)))[0].weights

    four, two = ranks(4), ranks(2)
    load_stock = FSEP + f" --load {first}" + WEIGHTS_ONLY
    assert_equal(four.run(initial_weights, command(4, load_stock))[0], saved)

    # FSEP on four ranks saves after two more steps; FSEP on two ranks, and stock, read that.
    trained = four.run(train, command(4, load_stock + save.format(second)))[0].weights
    load_fsep = f" --load {second}" + WEIGHTS_ONLY
    more_slots = FSEP + " --fsep-capacity 7" + load_fsep
    assert_equal(two.run(initial_weights, command(2, more_slots))[0], trained)
    assert_equal(four.run(initial_weights, command(4, load_fsep))[0], trained)
    # Two replicas of FSEP on two ranks, and two pipeline stages, each with half of the layers.
    assert_equal(four.run(initial_weights, command(2, FSEP + load_fsep))[0], trained)
    stages = " --pipeline-model-parallel-size 2"
    assert_equal(four.run(initial_weights, command(2, FSEP + stages + load_fsep))[0], trained)


def train_until_exit(flags: list[str]) -> None:
    """Train; Megatron ends a run that `--exit-interval` stops by leaving the interpreter."""
    with pytest.raises(SystemExit):
        train(flags)


@pytest.mark.parametrize("optimizer", ["", " --use-distributed-optimizer"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    ranks: Callable[[int], RankPool], text_data: str, tmp_path: Path, optimizer: str
) -> None:
    flags = partial(command_line, text_data, experts=6, expert_parallel=4, global_batch=8, steps=8)
    extra = FSEP + optimizer + " --ckpt-format torch_dist"
    save = f" --save {tmp_path} --save-interval 4"
    pool = ranks(4)
    whole = pool.run(train, flags(extra=extra))[0]
    pool.run(train_until_exit, flags(extra=extra + save + " --exit-interval 4"))
    rest = pool.run(train, flags(extra=extra + save + f" --load {tmp_path}"))[0]
    assert rest.losses == whole.losses[4:]
    assert rest.grad_norms == whole.grad_norms[4:]
    assert_equal(rest.weights, whole.weights)
