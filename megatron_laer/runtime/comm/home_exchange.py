"""Exchanges of replicas with their experts' homes: directly, or the faster way for each layout.

`direct.py` has the index and the data path of one matrix; `relay.py` is the way with two hops.

Legend: C replica slots per rank, h home experts of a rank. R rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.placed import Placed
from megatron_laer.runtime.comm.buffers import Workspace
from megatron_laer.runtime.comm.direct import send_grads, send_homes
from megatron_laer.runtime.comm.exchange import Exchange, ReusableWeights, result_of_restore
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group
from megatron_laer.runtime.comm.relay import RelayExchange
from megatron_laer.runtime.comm.stages import ExchangeCount, whole_group
from megatron_laer.runtime.comm.steps import Steps


class DirectExchange(Exchange):
    """Restores of replicas from homes, and reduces of gradients to there. Collective.

    Restores share a communicator and a workspace, reduces another of each, as in
    `HierarchicalExchange`.
    """

    def __init__(self, groups: FSEPGroups, count: ExchangeCount | None = None) -> None:
        self.groups = groups
        self.count = ExchangeCount() if count is None else count
        self.restore_workspace, self.reduce_workspace = Workspace(), Workspace()
        self._restore_stage = whole_group(groups, groups.parameters)
        self._reduce_stage = whole_group(groups, groups.gradients)

    @property
    def communicators(self) -> tuple[Group, ...]:
        return (self._restore_stage.group, self._reduce_stage.group)

    def prepare_restore(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None:
        index.for_direct(None if before is None else before.placed, self.groups.rank)

    def prepare_reduce(self, index: LayoutIndex) -> None:
        index.for_direct(None, self.groups.rank)

    def restore_steps(
        self,
        homes_hRK: Sequence[torch.Tensor],
        index: LayoutIndex,
        rows: int,
        /,
        *,
        reuse: ReusableWeights | None = None,
        out: torch.Tensor | None = None,
    ) -> Steps:
        """Fetch the experts of this rank's replica slots from their homes, [C, R, K].

        Args:
            homes_hRK: [R, K] of each home expert.
            reuse: weights of another layout, updated in place where an expert differs.
            out: contiguous [C, R, K] to restore to; not with `reuse`.
        """
        out_CRK = result_of_restore(homes_hRK, index, rows, reuse, out)
        before = None if reuse is None else reuse.index.placed
        needed = index.for_direct(before, self.groups.rank)
        if needed.has_work:
            with self.restore_workspace.lent() as lent:
                moved = yield from send_homes(needed, self._restore_stage, lent, homes_hRK, out_CRK)
            self.count.add_restore(*moved)
        return out_CRK

    def reduce_steps(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        add_to: Sequence[torch.Tensor] | None = None,
    ) -> Steps:
        """Sum the gradients of this rank's home experts over their replicas, in slot order.

        Sums run in float32 and are rounded once. Gradients cross in their own dtype.

        Args:
            grad_CRK: gradients of this rank's replicas, not modified.
            add_to: main gradient [R, K] of each home expert, to add the sums to.

        Returns:
            The sums of each home expert, [h, R, K] in the gradient's dtype; zero without replicas.
            A main gradient if they were added to these.
        """
        needed = index.for_direct(None, self.groups.rank)
        sums: dict[int, torch.Tensor] = {}
        with self.reduce_workspace.lent() as lent:
            received_nRK, moved = yield from send_grads(
                needed, self._reduce_stage, lent, grad_CRK.contiguous()
            )
            self.count.add_reduce(*moved)
            for expert, part_RK in zip(needed.sent, received_nRK, strict=True):
                sums[expert] = sums[expert] + part_RK if expert in sums else part_RK.float()
        if add_to is None:
            sums_hRK = grad_CRK.new_zeros((index.placed.geometry.home_slots, *grad_CRK.shape[1:]))
            for expert, sum_RK in sums.items():
                sums_hRK[expert].copy_(sum_RK)
            return sums_hRK
        for expert, sum_RK in sums.items():
            add_to[expert].add_(sum_RK)
        return add_to[0]


class ChosenExchange(Exchange):
    """Exchange of each layout by direct or by relay, as `choose` says on every rank alike."""

    def __init__(
        self,
        groups: FSEPGroups,
        relay: RelayExchange,
        choose: Callable[[Placed], ExchangeAlgorithm],
    ) -> None:
        self.count = relay.count
        self._choose = choose
        self._by_algorithm: dict[ExchangeAlgorithm, DirectExchange | RelayExchange] = {
            ExchangeAlgorithm.FLAT: DirectExchange(groups, relay.count),
            ExchangeAlgorithm.NODE: relay,
        }

    @property
    def communicators(self) -> tuple[Group, ...]:
        return tuple(
            group for exchange in self._by_algorithm.values() for group in exchange.communicators
        )

    def prepare_restore(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None:
        self._of(index).prepare_restore(index, before)

    def prepare_reduce(self, index: LayoutIndex) -> None:
        self._of(index).prepare_reduce(index)

    def restore_steps(
        self,
        homes_hRK: Sequence[torch.Tensor],
        index: LayoutIndex,
        rows: int,
        /,
        *,
        reuse: ReusableWeights | None = None,
        out: torch.Tensor | None = None,
    ) -> Steps:
        return self._of(index).restore_steps(homes_hRK, index, rows, reuse=reuse, out=out)

    def reduce_steps(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        add_to: Sequence[torch.Tensor] | None = None,
    ) -> Steps:
        return self._of(index).reduce_steps(grad_CRK, index, wire_dtype=wire_dtype, add_to=add_to)

    def _of(self, index: LayoutIndex) -> DirectExchange | RelayExchange:
        return self._by_algorithm[self._choose(index.placed)]
