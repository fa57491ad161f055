"""Checkpoints hold stock's names and shapes, and what a resumed planner needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.checkpoints import iteration_folder, saved_iteration, saved_tensors
from tests.parity.flags import command_line
from tests.parity.training import initial_weights, train
from tests.parity.weights import Tensors
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

FSEP = " --expert-parallel-mode fsep --fsep-planner static"
WEIGHTS_ONLY = " --no-load-optim --no-load-rng --finetune"
TORCH_DIST = " --ckpt-format torch_dist"


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """Every tensor, bit for bit."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@dataclass(frozen=True)
class Stop:
    """A run that loads a checkpoint and saves it again, and how it is parallel."""

    ranks: int
    expert_parallel: int
    mode: str = ""


@dataclass(frozen=True)
class Journey:
    """A checkpoint goes from one way of being parallel to the next."""

    name: str
    flags: str
    stops: tuple[Stop, ...]
    gated: bool = True


STOCK_TO_STOCK = (
    Stop(2, 2),
    Stop(4, 4, FSEP),
    Stop(2, 2, FSEP + " --fsep-capacity 7"),
    Stop(4, 2, FSEP),
    Stop(4, 4),
)
DISTRIBUTED = " --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
ASYNC = " --async-save --async-strategy mcore"
STAGES = " --pipeline-model-parallel-size 2"
TENSOR = " --tensor-model-parallel-size 2 --sequence-parallel"
JOURNEYS = (
    Journey("plain optimizer", "", STOCK_TO_STOCK),
    Journey(
        "distributed optimizer, bf16, async, fully parallel",
        DISTRIBUTED + ASYNC + " --bf16 --ckpt-fully-parallel-load",
        STOCK_TO_STOCK,
    ),
    Journey(
        "uneven rows of both matrices",  # 10 and 54 on four ranks
        DISTRIBUTED + " --ffn-hidden-size 10 --hidden-size 54 --num-attention-heads 3",
        STOCK_TO_STOCK,
        gated=False,
    ),
    Journey(
        "pipeline and tensor parallel",
        DISTRIBUTED,
        (
            Stop(2, 2),
            Stop(4, 4, FSEP + TENSOR),
            Stop(4, 2, FSEP + STAGES),
            Stop(4, 2, TENSOR),
            Stop(4, 4, FSEP),
        ),
    ),
)


@pytest.mark.parametrize("journey", JOURNEYS, ids=lambda journey: journey.name)
def test_weights_and_optimizer_state_survive_every_change_of_parallelism(
    ranks: Callable[[int], RankPool], text_data: str, tmp_path: Path, journey: Journey
) -> None:
    folders = []
    for number, stop in enumerate(journey.stops):
        source, target = tmp_path / str(number - 1), tmp_path / str(number)
        # The first run trains; the others have no step left, and save what they loaded.
        flags = journey.flags + TORCH_DIST + stop.mode + f" --save {target} --save-interval 1000"
        flags += " --save-interval 2" if number == 0 else f" --load {source}"
        command = command_line(
            text_data,
            experts=8,
            expert_parallel=stop.expert_parallel,
            global_batch=8,
            steps=2,
            extra=flags,
        )
        if not journey.gated:
            command.remove("--swiglu")
        ranks(stop.ranks).run(train, command)
        assert saved_iteration(target) == 2
        folders.append(iteration_folder(target, 2))

    first, *others = map(saved_tensors, folders)
    states = {key.split(".")[2] for key in first if key.startswith("optimizer.state.")}
    assert {"exp_avg", "exp_avg_sq"} <= states
    assert first["optimizer.state.exp_avg.decoder.layers.mlp.experts.experts.linear_fc1.weight"].any()
    for other in others:
        assert_equal(other, first)


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
