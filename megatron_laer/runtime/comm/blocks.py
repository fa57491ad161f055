"""Exchanges between slices of all experts and stock Megatron's blocks of whole experts.

Unlike restores, they use neither layouts nor workspaces.

Legend: N ranks, E experts, X blocks of e experts; R rows of a matrix, r rows of a rank, K columns.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_laer.planner.placed import row_bounds
from megatron_laer.runtime.comm.process_groups import Group


@torch.no_grad()
def gather_block(slice_ErK: torch.Tensor, rows: int, num_blocks: int, group: Group) -> torch.Tensor:
    """Return this rank's block of whole experts, [e, R, K], from all slices. Collective."""
    num_experts, _, columns = slice_ErK.shape
    block_size, num_ranks = num_experts // num_blocks, dist.get_world_size(group)
    shapes = [(block_size, height, columns) for height in _heights(rows, num_ranks)]
    sizes = [block * height * columns for block, height, columns in shapes]
    sent = slice_ErK.reshape(num_blocks, -1).repeat(num_ranks // num_blocks, 1)
    received = slice_ErK.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent.view(-1), sizes, [sent.shape[1]] * num_ranks, group=group)
    parts = zip(received.split(sizes), shapes, strict=True)
    return torch.cat([part.view(shape) for part, shape in parts], dim=1)


@torch.no_grad()
def scatter_block(block_eRK: torch.Tensor, slice_ErK: torch.Tensor, group: Group) -> None:
    """Write all ranks' blocks, each from the first rank that has it, to the slices. Collective."""
    block_size, rows, _ = block_eRK.shape
    num_blocks, num_ranks = slice_ErK.shape[0] // block_size, dist.get_world_size(group)
    has_senders = [sender < num_blocks for sender in range(num_ranks)]
    parts = block_eRK.split(_heights(rows, num_ranks), dim=1)
    if not has_senders[dist.get_rank(group)]:
        parts = tuple(part[:0] for part in parts)
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = slice_ErK.numel() // num_blocks
    dist.all_to_all_single(
        slice_ErK.view(-1),
        sent,
        [received * sends for sends in has_senders],
        [part.numel() for part in parts],
        group=group,
    )


def _heights(rows: int, num_ranks: int) -> list[int]:
    bounds = row_bounds(rows, num_ranks)
    return [end - start for start, end in pairwise(bounds)]
