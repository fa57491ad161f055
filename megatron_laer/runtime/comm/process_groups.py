"""Communicators over Megatron's expert-parallel group and over its nodes.

`exchange.py` decides what is exchanged, and `scheduler.py` when.

The FSEP group is Megatron's expert-parallel group: DDP, the optimizer, the gradient norm and
checkpoints already treat that group's parameters as distinct per rank. Parameters and gradients
have communicators of their own over the same ranks and over the nodes' sub-groups. Two exchanges on
one communicator are serialised, so a restore would delay the token All-to-All that should hide it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_laer.runtime.comm import launcher

Group = dist.ProcessGroup


@dataclass(frozen=True)
class FSEPGroups:
    """Communicators of one FSEP group of N ranks, G of them per node.

    Groups of nodes are None if nodes have one rank or all ranks of the group.

    Attributes:
        tokens: Megatron's expert-parallel group; token All-to-All and the exchange of counts.
        tokens_intra_node, tokens_inter_node: for a token exchange in two stages; else None.
        parameters, gradients: same ranks, for restores and for reduces.
        parameters_intra_node, gradients_intra_node: the ranks of this rank's node within the group.
        parameters_inter_node, gradients_inter_node: the ranks with this rank's local rank, one on
            every node.
        index: number of this FSEP group in the world (one per pipeline stage and replica).
    """

    tokens: Group
    tokens_intra_node: Group | None
    tokens_inter_node: Group | None
    parameters: Group
    gradients: Group
    parameters_intra_node: Group | None
    parameters_inter_node: Group | None
    gradients_intra_node: Group | None
    gradients_inter_node: Group | None
    ranks: tuple[int, ...]
    node_size: int
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.tokens)

    @property
    def planner_rank(self) -> int:
        """Return the global rank of the group's rank 0, where the planner runs."""
        return self.ranks[0]

    def extra(self) -> tuple[Group, ...]:
        groups = (
            self.tokens_intra_node,
            self.tokens_inter_node,
            self.parameters,
            self.gradients,
            self.parameters_intra_node,
            self.parameters_inter_node,
            self.gradients_intra_node,
            self.gradients_inter_node,
        )
        return tuple(group for group in groups if group is not None)

    def destroy(self) -> None:
        if dist.is_initialized():
            for group in self.extra():
                dist.destroy_process_group(group)


def detect_node_size(ranks: Sequence[int], local_world_size: int) -> int:
    """Derive the ranks of the FSEP group per node from the launcher's ranks per node."""
    nodes = [rank // local_world_size for rank in ranks]
    size = nodes.count(nodes[0])
    runs = [nodes[start : start + size] for start in range(0, len(nodes), size)]
    if any(len(run) != size or len(set(run)) != 1 for run in runs):
        raise ValueError(
            f"the FSEP group's ranks {list(ranks)} lie on nodes {nodes} ({local_world_size} ranks "
            "per node): not the same number on each, in order; give --fsep-node-size, or choose "
            "--expert-model-parallel-size so that groups fill nodes evenly"
        )
    return size


def ranks_per_node() -> int:
    return launcher.ranks_per_node(
        os.environ,
        dist.get_world_size(),
        torch.cuda.device_count(),
        on_cuda="nccl" in dist.get_backend(),
    )


def create_groups(
    expert_group: Group,
    node_size: int | None,
    create_group: Callable[..., Group],
    *,
    tokens_through_nodes: bool = False,
) -> FSEPGroups:
    """Create the FSEP communicators. Collective: every rank of the world must call it.

    Args:
        expert_group: Megatron's expert-parallel group of this rank.
        node_size: G, or None for `ranks_per_node`.
        create_group: Megatron's `parallel_state.create_group`, which lists groups so that Megatron
            can change their time-outs after start-up.
        tokens_through_nodes: whether tokens may be exchanged in two stages.

    Raises:
        ValueError: the node size is unknown, does not divide N, or differs between ranks. On every
            rank.
    """
    mine = tuple(dist.get_process_group_ranks(expert_group))
    sizes = _node_sizes(mine, node_size, tokens_through_nodes)

    # new_group is collective: every rank creates every group, in the same order. It does not wait.
    # With local synchronisation, ranks would count groups differently, and so name the world's next
    # one differently.
    made: dict[str, Group] = {}

    def make(kind: str, ranks: Sequence[int]) -> None:
        group = create_group(list(ranks), group_desc=f"FSEP_{kind.upper()}")
        if dist.get_rank() in ranks:
            made[kind] = group

    for ranks, size in sizes.items():
        make("parameters", ranks)
        make("gradients", ranks)
        if size in (1, len(ranks)):
            continue
        for exchange in ("parameters", "gradients", *(["tokens"] * tokens_through_nodes)):
            for start in range(0, len(ranks), size):
                make(f"{exchange}_intra_node", ranks[start : start + size])
            for local_rank in range(size):
                make(f"{exchange}_inter_node", ranks[local_rank::size])

    return FSEPGroups(
        tokens=expert_group,
        tokens_intra_node=made.get("tokens_intra_node"),
        tokens_inter_node=made.get("tokens_inter_node"),
        parameters=made["parameters"],
        gradients=made["gradients"],
        parameters_intra_node=made.get("parameters_intra_node"),
        parameters_inter_node=made.get("parameters_inter_node"),
        gradients_intra_node=made.get("gradients_intra_node"),
        gradients_inter_node=made.get("gradients_inter_node"),
        ranks=mine,
        node_size=sizes[mine],
        index=list(sizes).index(mine),
    )


def _node_sizes(
    mine: tuple[int, ...], node_size: int | None, tokens_through_nodes: bool
) -> dict[tuple[int, ...], int]:
    """Agree on the ranks of every FSEP group of the world and its ranks per node, in order.

    Every rank checks every group, so that all ranks raise and none hangs.
    """
    per_node: int | str = 0
    if node_size is None:
        try:
            per_node = ranks_per_node()
        except ValueError as error:
            per_node = str(error)
    settings = {"--fsep-node-size": node_size, "tokens through nodes": tokens_through_nodes}
    gathered: list[tuple[tuple[int, ...], int | str, dict[str, int | None]]]
    gathered = [((), 0, {})] * dist.get_world_size()
    dist.all_gather_object(gathered, (mine, per_node, settings))

    # Ranks that create different groups would wait for the others forever.
    for name in settings:
        values = sorted({str(of_rank[name]) for _, _, of_rank in gathered})
        if len(values) > 1:
            raise ValueError(
                f"{name} is {' on some ranks and '.join(values)} on others; give all ranks the "
                "same --fsep-node-size and --fsep-token-exchange"
            )
    said = {of_rank for _, of_rank, _ in gathered}
    problems = sorted(of_rank for of_rank in said if isinstance(of_rank, str))
    if problems:
        raise ValueError(problems[0])
    if len(said) > 1:
        raise ValueError(
            f"nodes have {sorted(said, key=str)} ranks: not the same number on each; give "
            "--fsep-node-size, if the group's ranks lie evenly on them"
        )
    local_world_size = int(per_node)
    sizes = {
        ranks: node_size or detect_node_size(ranks, local_world_size)
        for ranks in sorted({ranks for ranks, _, _ in gathered})
    }
    for ranks, size in sizes.items():
        if len(ranks) % size:
            raise ValueError(
                f"--fsep-node-size {size} does not divide the FSEP group of {len(ranks)} ranks "
                f"(--expert-model-parallel-size {len(ranks)}); divisors work: "
                f"{[d for d in range(1, len(ranks) + 1) if len(ranks) % d == 0]}"
            )
    return sizes
