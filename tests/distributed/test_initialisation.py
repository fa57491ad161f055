"""Expert weights depend on the seed, the layer, the matrix and the expert, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import initial_weights
from megatron_laer.cpu.weights import Tensors
from tests.parity.flags import command_line
from tests.parity.rows import HYBRID

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner static"


@pytest.fixture(scope="module")
def weights_of(ranks: RankPools, text_data: str) -> Callable[[int, int, str], Tensors]:
    """Return `weights_of(ranks, expert_parallel, extra flags)`."""

    def initial(size: int, expert_parallel: int, extra: str) -> Tensors:
        flags = command_line(
            text_data,
            " --ffn-hidden-size 512 --hidden-size 128" + extra,
            experts=4,
            expert_parallel=expert_parallel,
            global_batch=8,
            steps=1,
        )
        found: Tensors = ranks(size).run(initial_weights, flags)[0]
        return found

    return initial


def experts_of(weights: Tensors) -> Tensors:
    return {key: value for key, value in weights.items() if ".experts." in key}


@pytest.mark.parametrize("model", ["", HYBRID + "*E*E/*E"], ids=["GPT", "hybrid"])
def test_weights_do_not_depend_on_ranks_slots_or_pipeline(
    weights_of: Callable[[int, int, str], Tensors], model: str
) -> None:
    two = weights_of(2, 2, FSEP + model)
    others = [
        weights_of(4, 4, FSEP + model + " --fsep-capacity 4"),
        weights_of(4, 2, FSEP + model + " --pipeline-model-parallel-size 2"),
    ]
    for other in others:
        assert experts_of(two).keys() == experts_of(other).keys()
        for key, weight in experts_of(two).items():
            assert torch.equal(weight, other[key]), key


def test_seeds_layers_and_experts_differ_and_spread_like_stock(
    weights_of: Callable[[int, int, str], Tensors],
) -> None:
    fsep, stock = weights_of(2, 2, FSEP), weights_of(2, 2, "")
    other_seed = weights_of(2, 2, FSEP + " --seed 99")
    experts = experts_of(fsep)
    assert len(experts) == 2 * 2 * 4
    for (one, a), (two, b) in combinations(experts.items(), 2):
        assert a.shape != b.shape or not torch.equal(a, b), f"{one} equals {two}"
    for key, weight in experts.items():
        assert not torch.equal(weight, other_seed[key])
        assert weight.std() == pytest.approx(stock[key].std().item(), rel=0.02), key
        assert abs(weight.mean()) < 0.02 * weight.std()


def initial_weights_without_drawing_experts(flags: list[str]) -> Tensors:
    from megatron_laer.layer.experts import module

    with mock.patch.object(module, "initialise", lambda slice_ErK, *_: slice_ErK.data.zero_()):
        return initial_weights(flags)


def test_drawing_experts_leaves_the_dense_weights_as_they_would_be_without(
    ranks: RankPools, text_data: str
) -> None:
    flags = command_line(text_data, FSEP, experts=4, steps=1)
    drawn = ranks(2).run(initial_weights, flags)[0]
    not_drawn = ranks(2).run(initial_weights_without_drawing_experts, flags)[0]
    assert all(weight.abs().sum() == 0 for weight in experts_of(not_drawn).values())
    for key in drawn.keys() - experts_of(drawn).keys():
        assert torch.equal(drawn[key], not_drawn[key]), key
