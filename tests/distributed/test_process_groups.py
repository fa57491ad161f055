"""The FSEP dimension in Megatron's process groups: made, reachable and destroyed with them."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.distributed.conftest import refusal


def groups_of(
    expert_parallel: int, node_size: int | None, token_exchange: str = "rank"
) -> dict[str, Any]:
    """Initialise Megatron's state with FSEP, describe the groups, and destroy everything."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    import megatron_laer
    from megatron_laer import session

    dist.init_process_group("gloo")
    try:
        settings: Any = {"node_size": node_size, "token_exchange": token_exchange}
        megatron_laer.enable(megatron_laer.FSEPConfig(**settings))
        parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
        current = session.current()
        assert current is not None
        groups = current.groups
        collection = ProcessGroupCollection.use_mpu_process_groups()

        def members(group: Any) -> list[int] | None:
            return None if group is None else dist.get_process_group_ranks(group)

        found = {
            "ranks": groups.ranks,
            "index": groups.index,
            "intra_node": [
                members(groups.parameters_intra_node),
                members(groups.gradients_intra_node),
            ],
            "inter_node": [
                members(groups.parameters_inter_node),
                members(groups.gradients_inter_node),
            ],
            "tokens": [members(groups.tokens_intra_node), members(groups.tokens_inter_node)],
            "parameters": members(groups.parameters),
            "gradients": members(groups.gradients),
            "distinct": len({groups.tokens, *groups.extra()}),
            "field": collection.fsep is megatron_laer.get_fsep_group(),
        }
        extra = groups.extra()
        parallel_state.destroy_model_parallel()
        found["destroyed"] = not current.has_groups and all(
            group not in dist.distributed_c10d._world.pg_map for group in extra
        )
        return found
    finally:
        megatron_laer.disable()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("node_size", "token_exchange", "distinct"),
    [(2, "rank", 7), (2, "auto", 9), (1, "node", 3)],  # one stage goes over Megatron's group
)
def test_no_two_exchanges_of_four_ranks_on_nodes_share_a_communicator(
    ranks: RankPools, node_size: int, token_exchange: str, distinct: int
) -> None:
    for rank, found in enumerate(ranks(4).run(groups_of, 4, node_size, token_exchange)):
        assert found["ranks"] == (0, 1, 2, 3)
        stages: list[Any] = [None, None]
        if node_size == 2:
            stages = [[0, 1] if rank < 2 else [2, 3], [0, 2] if rank % 2 == 0 else [1, 3]]
        assert [found["intra_node"], found["inter_node"]] == [[stage] * 2 for stage in stages]
        assert found["tokens"] == (stages if token_exchange == "auto" else [None, None])
        assert found["parameters"] == found["gradients"] == [0, 1, 2, 3]
        assert found["distinct"] == distinct
        assert found["field"]
        assert found["destroyed"]


def test_replicas_have_groups_of_their_own(ranks: RankPools) -> None:
    for rank, found in enumerate(ranks(4).run(groups_of, 2, None)):
        assert found["ranks"] == ((0, 1) if rank < 2 else (2, 3))
        assert found["index"] == rank // 2
        assert found["intra_node"] == found["inter_node"] == [None, None], "one node has them all"
        assert found["distinct"] == 3


def groups_unlike(of_ranks: list[tuple[str, tuple[Any, ...]]]) -> None:
    """Make groups; each rank has its launcher's number of ranks on a node, and its settings."""
    ranks_of_node, settings = of_ranks[int(os.environ["RANK"])]
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=ranks_of_node):
        groups_of(2, *settings)


@pytest.mark.parametrize(
    ("of_ranks", "message"),
    [
        ([("2", (None,)), ("1", (None,))], "[1, 2] ranks: not the same number"),
        (
            [("2", (2,)), ("2", (2, "node"))],
            "tokens through nodes is False on some ranks and True on others",
        ),
        ([("2", (2,)), ("2", (1,))], "--fsep-node-size is 1 on some ranks and 2 on others"),
    ],
    ids=["launchers", "tokens", "node sizes"],
)
def test_ranks_that_would_make_other_groups_are_refused_on_every_rank(
    ranks: RankPools, of_ranks: list[tuple[str, tuple[Any, ...]]], message: str
) -> None:
    assert message in refusal(ranks(2).run_raw(groups_unlike, of_ranks), "ValueError")


def groups_across_a_node_and_inside_one() -> tuple[int, float]:
    """Make groups of 4 on nodes of 6: one lies inside a node, one spans two."""
    import torch
    import torch.distributed as dist

    from megatron_laer.runtime.comm import process_groups

    dist.init_process_group("gloo")
    try:
        first = dist.get_rank() // 4 * 4
        expert_groups = [dist.new_group(list(range(start, start + 4))) for start in (0, 4)]
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="6"):
            made = process_groups.create_groups(expert_groups[first // 4], None, dist.new_group)
        total = torch.ones(())
        dist.all_reduce(total, group=dist.new_group())
        return len(made.extra()), total.item()
    finally:
        dist.destroy_process_group()


def test_ranks_go_on_alike_where_fsep_groups_are_unlike(ranks: RankPools) -> None:
    """A group of the world that is made afterwards has one name on all ranks."""
    found = ranks(8).run(groups_across_a_node_and_inside_one)
    assert found == [(2, 8.0)] * 4 + [(6, 8.0)] * 4


def test_ranks_unevenly_spread_over_nodes_are_refused() -> None:
    from megatron_laer.runtime.comm.process_groups import detect_node_size

    assert detect_node_size((0, 1, 2, 3), local_world_size=2) == 2
    assert detect_node_size((0, 2, 4, 6), local_world_size=4) == 2
    with pytest.raises(ValueError, match="--fsep-node-size"):
        detect_node_size((0, 1, 2, 3), local_world_size=3)
