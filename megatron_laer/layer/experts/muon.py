"""Megatron's Muon with Newton-Schulz steps on each expert's whole matrix.

A rank holds some rows of every expert. Momentum and weight decay work on rows, and stay Megatron's.
One All-to-All assembles each matrix on one rank of the FSEP group, where Megatron's own function
computes the update; another one returns the updates. Other replicas' groups repeat the work.

Legend: E experts, R rows of a matrix, r rows of this rank's slice, K columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

from megatron_laer.layer.experts.whole_matrix import WholeMatrix, whole_matrix_of
from megatron_laer.runtime.comm.blocks import WholeMatrices

# From this number of matrices per rank, the imbalance of one more is small.
_ENOUGH_PER_RANK = 8


@dataclass
class _Batch:
    """Slices that are exchanged together; `waiting` has this step's updates to orthogonalise."""

    exchange: WholeMatrices
    slices: list[tuple[torch.Tensor, WholeMatrix]]
    waiting: list[torch.Tensor] = field(default_factory=list)


class ExpertMuon(TensorParallelMuon):
    """Muon with slices of experts in batches, and other matrices as Megatron's."""

    def __init__(self, params: Any, *, fsep_group: dist.ProcessGroup, **options: Any) -> None:
        super().__init__(params, **options)
        self._group = fsep_group
        self._model_slices = [
            (parameter, whole)
            for group in self.param_groups
            for parameter in group["params"]
            if (whole := whole_matrix_of(parameter)) is not None
        ]
        self._batch_of: dict[torch.Tensor, _Batch] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters. Collective over the FSEP group."""
        if self._batch_of is None:
            # Only now: Megatron replaces parameters by fp32 copies, or omits those that other
            # replicas update.
            self._batch_of = {
                parameter: batch for batch in self._batches() for parameter, _ in batch.slices
            }
        return super().step(closure)

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **group: Any) -> torch.Tensor:
        """Return a parameter's update, which Megatron's loop scales by the learning rate.

        It is zero for a batch's slices but the last one, which updates the others here.
        """
        assert self._batch_of is not None, "only `step` orthogonalises"
        batch = self._batch_of.get(p)
        if batch is None:
            return self._stock(p, grad)
        batch.waiting.append(grad)
        if len(batch.waiting) < len(batch.slices):
            return grad.new_zeros(())
        gathered_RK = batch.exchange.gather(batch.waiting)
        batch.waiting.clear()
        updates_RK = [
            self._stock(_stocks_parameter(batch.slices[at][1]), matrix_RK)
            for (at, _), matrix_RK in zip(batch.exchange.mine, gathered_RK, strict=True)
        ]
        *updates_ErK, last_ErK = batch.exchange.scatter(updates_RK)
        for (parameter, _), update_ErK in zip(batch.slices[:-1], updates_ErK, strict=True):
            parameter.add_(update_ErK, alpha=-group["lr"])
        return last_ErK

    def _stock(self, p: Any, grad: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = super().orthogonalize(p, grad)
        return update

    def _batches(self) -> Iterator[_Batch]:
        """Group slices until the matrices of each size divide over the ranks, or are enough.

        A batch has slices of one parameter group, and so one learning rate.
        """
        whole_of = {
            getattr(parameter, "main_param", parameter): whole
            for parameter, whole in self._model_slices
        }
        for group in self.param_groups:
            slices = [(p, whole_of[p]) for p in group["params"] if p in whole_of]
            first, matrices = 0, Counter[tuple[int, int]]()
            for end, (parameter, whole) in enumerate(slices, start=1):
                matrices[whole.rows, parameter.shape[2]] += parameter.shape[0]
                is_enough = matrices.total() >= _ENOUGH_PER_RANK * self._group.size()
                is_even = not any(count % self._group.size() for count in matrices.values())
                if is_enough or is_even or end == len(slices):
                    yield self._batch(slices[first:end])
                    first = end
                    matrices.clear()

    def _batch(self, slices: list[tuple[torch.Tensor, WholeMatrix]]) -> _Batch:
        shapes_ERK = [(p.shape[0], whole.rows, p.shape[2]) for p, whole in slices]
        costs = [_multiplications(rows, columns) for _, rows, columns in shapes_ERK]
        device = slices[0][0].device
        return _Batch(WholeMatrices(shapes_ERK, costs, self._group, device), slices)


def _multiplications(rows: int, columns: int) -> int:
    """Count the multiplications of a Newton-Schulz step: X·Xᵀ, its square, and that times X."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


def _stocks_parameter(whole: WholeMatrix) -> Any:
    return SimpleNamespace(expert_tp=True, partition_dim=whole.partition_dim)
