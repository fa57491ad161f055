"""Expert weights depend on the seed, the layer, the matrix and the expert, and on nothing else."""

from __future__ import annotations

from itertools import combinations
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.training import initial_weights
from megatron_laer.cpu.weights import Tensors
from tests.checkpoints import assert_equal
from tests.distributed.conftest import Trainings
from tests.parity.rows import HYBRID, PIPELINE

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows --fsep-planner static"


def weights_of(trained: Trainings, size: int, expert_parallel: int, extra: str) -> Tensors:
    flags = " --ffn-hidden-size 512 --hidden-size 128" + extra
    options = {"size": size, "expert_parallel": expert_parallel, "experts": 4, "steps": 1}
    found: Tensors = trained(flags, by=initial_weights, **options)
    return found


def experts_of(weights: Tensors) -> Tensors:
    return {key: value for key, value in weights.items() if ".experts." in key}


@pytest.mark.parametrize("model", ["", HYBRID + "*E*E/*E"], ids=["GPT", "hybrid"])
def test_weights_do_not_depend_on_ranks_slots_or_pipeline(trained: Trainings, model: str) -> None:
    two = experts_of(weights_of(trained, 2, 2, FSEP + model))
    for expert_parallel, more in ((4, " --fsep-capacity 4"), (2, PIPELINE)):
        other = weights_of(trained, 4, expert_parallel, FSEP + model + more)
        assert_equal(experts_of(other), two)


def test_seeds_layers_and_experts_differ_and_spread_like_stock(trained: Trainings) -> None:
    fsep, stock = weights_of(trained, 2, 2, FSEP), weights_of(trained, 2, 2, "")
    other_seed = weights_of(trained, 2, 2, FSEP + " --seed 99")
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
    trained: Trainings,
) -> None:
    drawn, not_drawn = (
        trained(FSEP, by=by, experts=4, steps=1)
        for by in (initial_weights, initial_weights_without_drawing_experts)
    )
    assert all(weight.abs().sum() == 0 for weight in experts_of(not_drawn).values())
    for key in drawn.keys() - experts_of(drawn).keys():
        assert torch.equal(drawn[key], not_drawn[key]), key
