"""Each expert's matrix is whole on one rank for its update, and replicas may share the updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.planner.sharding import row_bounds
from megatron_laer.plugin import pretraining
from megatron_laer.runtime.comm.blocks import WholeMatrices
from tests.parity.compare import distance
from tests.parity.flags import command_line
from tests.parity.row import BF16_BOUND, FSEP
from tests.parity.rows import MUON, MUON_BF16, RANDOM

# Rows that divide, that do not, and fewer than ranks; as many matrices as ranks, and fewer.
SHAPES_ERK = [(3, 4, 5), (3, 5, 2), (1, 1, 3)]


def to_owners_and_back() -> list[tuple[int, int]]:
    """Gather and scatter matrices whose elements identify them; return this rank's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wholes_ERK = [
        100.0 * place + torch.arange(float(torch.Size(shape).numel())).view(shape)
        for place, shape in enumerate(SHAPES_ERK)
    ]
    slices_ErK = [
        whole_ERK[:, slice(*row_bounds(whole_ERK.shape[1], ranks)[rank : rank + 2])]
        for whole_ERK in wholes_ERK
    ]
    matrices = WholeMatrices(SHAPES_ERK, [9, 4, 1], dist.group.WORLD, torch.device("cpu"))
    gathered_RK = matrices.gather(slices_ErK)
    for (at, expert), matrix_RK in zip(matrices.mine, gathered_RK, strict=True):
        assert torch.equal(matrix_RK, wholes_ERK[at][expert])
    scattered_ErK = matrices.scatter([-matrix_RK for matrix_RK in gathered_RK])
    for back, there in zip(scattered_ErK, slices_ErK, strict=True):
        assert torch.equal(back, -there)
    return matrices.mine


def in_a_group(function: Callable[[], Any]) -> Any:
    dist.init_process_group("gloo")
    try:
        return function()
    finally:
        dist.destroy_process_group()


def test_matrices_come_whole_to_one_rank_each_and_go_back(ranks: RankPools) -> None:
    for size in (2, 4):
        owned = ranks(size).run(in_a_group, to_owners_and_back)
        everything = [(at, e) for at, shape in enumerate(SHAPES_ERK) for e in range(shape[0])]
        assert sorted(matrix for mine in owned for matrix in mine) == everything


def count_updates(flags: list[str]) -> list[tuple[int, ...]]:
    from megatron_laer.layer.experts.muon import ExpertMuon

    shapes = []
    stock = ExpertMuon._stock

    def counted(self: Any, p: Any, grad: torch.Tensor) -> torch.Tensor:
        if not isinstance(p, torch.Tensor):
            shapes.append(tuple(grad.shape))
        return stock(self, p, grad)

    with mock.patch.object(ExpertMuon, "_stock", counted):
        train(flags)
    return shapes


def test_every_expert_is_updated_once_per_group_by_ranks_that_share_the_work(
    ranks: RankPools, text_data: str
) -> None:
    steps, experts, layers = 2, 3, 2
    command = command_line(text_data, FSEP + MUON + RANDOM, experts=experts, steps=steps)
    done = ranks(2).run(count_updates, command)
    for shape in ((128, 48), (48, 64)):
        assert sum(mine.count(shape) for mine in done) == steps * experts * layers
        # Three matrices do not divide over two ranks, but those of both layers do.
        assert {mine.count(shape) for mine in done} == {steps * experts * layers // 2}


def train_with_layout(flags: list[str]) -> tuple[Record, set[bool]]:
    """Train with the buffers that Megatron lays out for its distributed Muon.

    In 0.19 Megatron makes them only for models that a function builds. Return True if it did.
    """
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    def by_function(args: Any) -> dict[str, Any]:
        container = pretrain_cfg_container_from_args(args)
        return {"cfg_container": container, "model_provider": pretraining.build_gpt}

    def has_layout(model: Any) -> set[bool]:
        buffers = [*model[0].buffers, *model[0].expert_parallel_buffers]
        return {buffer.params[0].is_managed_by_layer_wise_optimizer for buffer in buffers}

    with mock.patch("pretrain_gpt.pretrain_arguments", by_function):
        record = train(flags, has_layout)
    return record, record.probes[0]


def test_replicas_share_updates_by_megatrons_layout_of_buffers_too(
    ranks: RankPools, text_data: str
) -> None:
    def run(extra: str) -> Record:
        command = command_line(
            text_data, MUON_BF16 + " --use-distributed-optimizer" + extra, global_batch=8, steps=12
        )
        record, buffers = ranks(4).run(train_with_layout, command)[0]
        assert buffers == {True, False}, "Muon's parameters have buffers of their own"
        return record

    found = distance(run(FSEP + RANDOM), run(""))
    assert found.within(BF16_BOUND), found
