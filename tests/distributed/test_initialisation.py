"""Expert weights depend on the seed, the layer, the matrix and the expert, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch

from tests.parity.flags import command_line
from tests.parity.training import initial_weights
from tests.parity.weights import Tensors
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

FSEP = " --expert-parallel-mode fsep --fsep-planner static"


@pytest.fixture(scope="module")
def weights_of(
    ranks: Callable[[int], RankPool], text_data: str
) -> Callable[[int, int, str], Tensors]:
    """`weights_of(ranks, expert_parallel, extra flags)`."""

    def initial(size: int, expert_parallel: int, extra: str) -> Tensors:
        flags = command_line(
            text_data,
            experts=4,
            expert_parallel=expert_parallel,
            global_batch=8,
            steps=1,
            extra=" --ffn-hidden-size 512 --hidden-size 128" + extra,
        )
        found: Tensors = ranks(size).run(initial_weights, flags)[0]
        return found

    return initial


def experts_of(weights: Tensors) -> Tensors:
    return {key: value for key, value in weights.items() if ".experts." in key}


def test_weights_do_not_depend_on_ranks_slots_or_pipeline(
    weights_of: Callable[[int, int, str], Tensors],
) -> None:
    two = weights_of(2, 2, FSEP)
    others = [
        weights_of(4, 4, FSEP + " --fsep-capacity 4"),
        weights_of(4, 2, FSEP + " --pipeline-model-parallel-size 2"),
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
    assert len(experts) == 2 * 2 * 4  # layers, matrices, experts
    for (one, a), (two, b) in combinations(experts.items(), 2):
        assert a.shape != b.shape or not torch.equal(a, b), f"{one} equals {two}"
    for key, weight in experts.items():
        assert not torch.equal(weight, other_seed[key])
        assert weight.std() == pytest.approx(stock[key].std().item(), rel=0.02), key
        assert abs(weight.mean()) < 0.02 * weight.std()


def test_the_experts_draws_leave_the_dense_weights_as_in_another_fsep_run(
    weights_of: Callable[[int, int, str], Tensors],
) -> None:
    # More slots draw nothing more; a generator that is not forked would show here.
    few, many = weights_of(2, 2, FSEP), weights_of(2, 2, FSEP + " --fsep-capacity 4")
    for key in few.keys() - experts_of(few).keys():
        assert torch.equal(few[key], many[key]), key
