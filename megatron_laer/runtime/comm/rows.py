"""Copies and sums of matrix rows: Triton kernels on CUDA, torch elsewhere.

The torch code is the reference for `kernels.py`.

Legend: G ranks per node, M nodes, C slots, D distinct experts of a node, n slots of a node. R rows
of a matrix, r rows of a rank, P rows of a local rank on all nodes together, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch

from megatron_laer.arrays import Int64
from megatron_laer.runtime.comm.blocks import RowBlocks


@cache
def kernels_of(package: str, device: torch.device) -> Any:
    """Return the package's module of Triton kernels, or None where they cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module(f"{package}.kernels")


@dataclass(frozen=True, eq=False)
class ReplicaSums:
    """Parts of each sum, at least one, in the order of addition.

    Each target has one writer, so sums need no atomics and have the same bits every time.

    Attributes:
        num_targets: number of sums.
        csr: the parts of sum d are `csr[csr[d] : csr[d + 1]]`.
        uploaded: the same on the device.
    """

    num_targets: int
    csr: Int64
    uploaded: torch.Tensor


def pack_rows(
    whole_CRK: torch.Tensor,
    by_local_rank: torch.Tensor,
    blocks: RowBlocks,
    first: int,
    capacity: int,
) -> None:
    """Copy whole matrices to a send buffer, local rank by local rank.

    Args:
        whole_CRK: of slots `first`, `first` + 1, …, contiguous.
        by_local_rank: flat; for each local rank, [capacity, P, K].
    """
    if (kernels := exchange_kernels(whole_CRK)) is not None:
        kernels.move_rows(whole_CRK, by_local_rank, blocks, first, capacity, packs=True)
        return
    for whole, part in blocks.pairs(whole_CRK, by_local_rank, first, capacity):
        part.copy_(whole)


def unpack_rows(
    whole_CRK: torch.Tensor,
    by_local_rank: torch.Tensor,
    blocks: RowBlocks,
    first: int,
    capacity: int,
) -> None:
    """Undo `pack_rows`, with the same arguments."""
    if (kernels := exchange_kernels(whole_CRK)) is not None:
        kernels.move_rows(whole_CRK, by_local_rank, blocks, first, capacity, packs=False)
        return
    for whole, part in blocks.pairs(whole_CRK, by_local_rank, first, capacity):
        whole.copy_(part)


def gather_rows(
    arrived: torch.Tensor,
    position_n: torch.Tensor,
    num_fetched: int,
    num_shared: int,
    target_nPK: torch.Tensor,
    blocks: RowBlocks,
    local_rank: int,
) -> None:
    """Gather a local rank's rows of experts that arrived in part by node, in part whole.

    Args:
        arrived: flat; experts fetched, [D, r, K] node by node, then shared ones, [D, P, K].
        position_n: each wanted expert's position among those fetched, then shared.
    """
    if (kernels := exchange_kernels(arrived)) is not None:
        kernels.gather_rows(arrived, position_n, num_fetched, target_nPK, blocks, local_rank)
        return
    _, rows, columns = target_nPK.shape
    fetched, shared = arrived.split([part * rows * columns for part in (num_fetched, num_shared)])
    sizes = blocks.rows_GM[local_rank]
    fetched_M = fetched.split([num_fetched * size * columns for size in sizes])
    shared_M = shared.view(num_shared, rows, columns).split(sizes, dim=1)
    targets_M = target_nPK.split(sizes, dim=1)
    for size, part, shared_DrK, target_nrK in zip(
        sizes, fetched_M, shared_M, targets_M, strict=True
    ):
        experts_DrK = torch.cat((part.view(num_fetched, size, columns), shared_DrK))
        target_nrK.copy_(experts_DrK.index_select(0, position_n))


def sum_replicas(
    parts_nPK: torch.Tensor,
    sums: ReplicaSums,
    out: torch.Tensor,
    blocks: RowBlocks,
    local_rank: int,
    *,
    adds: bool = False,
) -> None:
    """Sum replicas in float32 and in the order of `sums`, and round once, to `out`.

    Args:
        parts_nPK: contiguous; replicas' rows of one local rank.
        out: contiguous, of any float dtype; [D, r, K] node by node.
        adds: whether to add the sums to `out`.
    """
    if sums.num_targets == 0:
        return
    if (kernels := exchange_kernels(parts_nPK)) is not None:
        kernels.sum_replicas(parts_nPK, sums, out, blocks, local_rank, adds=adds)
        return
    columns, sizes = parts_nPK.shape[2], blocks.rows_GM[local_rank]
    csr: list[int] = sums.csr.tolist()
    sources_D = [csr[start:end] for start, end in pairwise(csr[: sums.num_targets + 1])]
    targets_M = out.view(-1).split([len(sources_D) * size * columns for size in sizes])
    for size, parts_nrK, target in zip(
        sizes, parts_nPK.split(sizes, dim=1), targets_M, strict=True
    ):
        for sum_rK, (first, *others) in zip(
            target.view(len(sources_D), size, columns), sources_D, strict=True
        ):
            total = parts_nrK[first].float()
            for source in others:
                total = total + parts_nrK[source]
            if adds:
                sum_rK.add_(total)
            else:
                sum_rK.copy_(total)


def exchange_kernels(tensor: torch.Tensor) -> Any:
    return kernels_of("megatron_laer.runtime.comm", tensor.device)
