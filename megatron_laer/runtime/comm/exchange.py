"""Hierarchical exchange: restores of experts and reduces of their gradients, node by node.

`node_exchange` has one stage between nodes and one inside a node; a weight crosses nodes once for
each distinct expert of a node. `flat_exchange` treats the group as one node, with a single
All-to-All each. Both move the same values. `restore.py` and `reduce.py` have the data path of one
matrix.

Legend: N ranks, E experts, C slots per rank, G ranks per node. R rows of a matrix, r rows of one
rank's slice, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from megatron_laer.config import FSEPConfig, WireDtype
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.workspace import reduce_workspace, restore_workspace
from megatron_laer.runtime.comm.blocks import row_blocks
from megatron_laer.runtime.comm.buffers import MatrixBuffers, Workspace
from megatron_laer.runtime.comm.copies import read_here
from megatron_laer.runtime.comm.layout_index import LayoutIndex
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group
from megatron_laer.runtime.comm.reduce import ReduceIndex, reduce_matrix
from megatron_laer.runtime.comm.restore import RestoreIndex, restore_matrix
from megatron_laer.runtime.comm.stages import DataPath, ExchangeCount, Stage, Stages, whole_group
from megatron_laer.runtime.comm.steps import Steps, finish

_WIRE_DTYPES = {
    WireDtype.BF16: torch.bfloat16,
    WireDtype.FP16: torch.float16,
    WireDtype.FP32: torch.float32,
}


@dataclass(frozen=True)
class ReusableWeights:
    """Restored matrix and its layout, to update in place until the optimizer changes the slices."""

    index: LayoutIndex
    matrix_CRK: torch.Tensor


class Exchange(Protocol):
    """Restores and reduces of matrices, collective over the FSEP group.

    `source` and `add_to` are a rank's share of weights and main gradients, as the exchange takes
    it: a slice, or matrices of home experts. Those of a layer's matrices may run side by side, step
    by step (`steps.py`).
    """

    count: ExchangeCount

    @property
    def communicators(self) -> tuple[Group, ...]:
        """Return the communicators that exchanges of layouts can use, as on all ranks."""
        ...

    def prepare_restore(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None: ...

    def prepare_reduce(self, index: LayoutIndex) -> None: ...

    def restore_steps(
        self,
        source: Any,
        index: LayoutIndex,
        rows: int,
        /,
        *,
        reuse: ReusableWeights | None = None,
        out: torch.Tensor | None = None,
    ) -> Steps: ...

    def reduce_steps(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        add_to: Any = None,
    ) -> Steps: ...

    @torch.no_grad()
    def restore(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run `restore_steps` to their end."""
        return finish(self.restore_steps(*args, **kwargs))

    @torch.no_grad()
    def reduce(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run `reduce_steps` to their end."""
        return finish(self.reduce_steps(*args, **kwargs))


class HierarchicalExchange(Exchange):
    """Restores and reduces, collective over the FSEP group: all ranks call in the same order.

    A restore's inter-node stage fetches rows of each distinct expert that this node needs, from the
    peers of the same local rank. In its intra-node stage, the ranks of a node exchange those rows
    for their slots. A reduce goes the other way, and sums before and after the inter-node stage.

    Restores share a communicator and a workspace, reduces another of each. So one restore and one
    reduce may be in flight at once, from two threads or two streams, but no two restores.

    Args:
        node_size: G, ranks per node; it divides N.
        grad_wire_dtype: of gradients between nodes; overrides a reduce's.
    """

    def __init__(
        self,
        groups: FSEPGroups,
        node_size: int,
        restore_stages: Stages,
        reduce_stages: Stages,
        grad_wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.groups = groups
        self.node_size = node_size
        self.count = ExchangeCount()
        self.restore_workspace, self.reduce_workspace = Workspace(), Workspace()
        self._node, self._local_rank = divmod(groups.rank, node_size)
        self._restore_stages, self._reduce_stages = restore_stages, reduce_stages
        self._grad_wire_dtype = grad_wire_dtype

    @property
    def communicators(self) -> tuple[Group, ...]:
        return (*self._restore_stages.groups, *self._reduce_stages.groups)

    def prepare_restore(self, index: LayoutIndex, before: LayoutIndex | None = None) -> None:
        """Build the index tensors that restores of this layout need, unless they exist.

        Call it before a restore, on the stream that submits it, since other CUDA streams read them
        too.
        """
        self.restore_index_of(index, before)

    def prepare_reduce(self, index: LayoutIndex) -> None:
        self.reduce_index_of(index)

    def restore_steps(
        self,
        slice_ErK: torch.Tensor,
        index: LayoutIndex,
        rows: int,
        /,
        *,
        reuse: ReusableWeights | None = None,
        out: torch.Tensor | None = None,
    ) -> Steps:
        """Restore whole experts for this rank's slots.

        Args:
            slice_ErK: this rank's rows of every expert.
            rows: R, rows of the whole matrix.
            reuse: weights of another layout, the same one on all ranks. Only slots with another
                expert are restored, in place; only experts new to a node cross nodes. If no slot of
                any rank differs, there is no collective.
            out: contiguous [C, R, K] to restore to, instead of a new tensor; not with `reuse`.

        Returns:
            [C, R, K], the expert of this rank's slot c at c; `out` or the reused tensor if given.
        """
        out_CRK = result_of_restore(slice_ErK, index, rows, reuse, out)
        needed = self.restore_index_of(index, None if reuse is None else reuse.index)
        if needed.has_work:
            yield from self.restore_rows(needed, index, slice_ErK, out_CRK)
        return out_CRK

    def restore_rows(
        self,
        needed: RestoreIndex,
        index: LayoutIndex,
        slice_ErK: torch.Tensor,
        out_CRK: torch.Tensor,
    ) -> Generator[Group | None]:
        """Restore the slots of `needed` from ranks' rows of its experts."""
        read_here(needed.position_n)
        _, rows, columns = out_CRK.shape
        sizes = restore_workspace(self.geometry_of(index), rows, columns, slice_ErK.element_size())
        with self.restore_workspace.lent() as lent:
            buffers = MatrixBuffers(lent, sizes, slice_ErK.device)
            path = self._path(self._restore_stages, rows, buffers, self.count.add_restore)
            yield from restore_matrix(needed, path, slice_ErK, out_CRK)

    def reduce_steps(
        self,
        grad_CRK: torch.Tensor,
        index: LayoutIndex,
        *,
        wire_dtype: torch.dtype | None = None,
        add_to: torch.Tensor | None = None,
    ) -> Steps:
        """Sum gradients over replicas, for this rank's slice of every expert.

        Sums run in float32 and in a fixed order: the same gradients give the same bits. They are
        rounded once, to the dtype of the result.

        Args:
            grad_CRK: gradients of this rank's restored experts, not modified.
            wire_dtype: of sums that cross nodes, unless set for the exchange; default: the
                gradient's.
            add_to: main gradient to add the sums to, contiguous [E, r, K] of any float dtype.

        Returns:
            `add_to`, or a new [E, r, K] in the gradient's dtype, as autograd demands.
        """
        grad_CRK = grad_CRK.contiguous()
        shape = (index.placed.geometry.num_experts, *self.own_rows_of(grad_CRK))
        out_ErK = grad_CRK.new_empty(shape) if add_to is None else add_to
        assert out_ErK.shape == shape and out_ErK.is_contiguous()
        wire = self.wire_dtype_of(grad_CRK, wire_dtype)
        yield from self.reduce_rows(index, grad_CRK, out_ErK, wire, adds=add_to is not None)
        return out_ErK

    def reduce_rows(
        self,
        index: LayoutIndex,
        grad_CRK: torch.Tensor,
        out_ErK: torch.Tensor,
        wire: torch.dtype,
        *,
        adds: bool,
    ) -> Generator[Group | None]:
        """Sum replicas into or onto this rank's rows of the index's experts."""
        _, rows, columns = grad_CRK.shape
        sizes = reduce_workspace(
            self.geometry_of(index), rows, columns, grad_CRK.element_size(), wire.itemsize
        )
        needed = self.reduce_index_of(index)
        read_here(needed.intra_node.uploaded)
        with self.reduce_workspace.lent() as lent:
            buffers = MatrixBuffers(lent, sizes, grad_CRK.device)
            path = self._path(self._reduce_stages, rows, buffers, self.count.add_reduce)
            yield from reduce_matrix(needed, path, grad_CRK, out_ErK, wire, adds=adds)

    def wire_dtype_of(self, grad_CRK: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
        return self._grad_wire_dtype or wanted or grad_CRK.dtype

    def own_rows_of(self, whole_CRK: torch.Tensor) -> tuple[int, int]:
        """Return [r, K], the shape of this rank's rows of one matrix."""
        _, rows, columns = whole_CRK.shape
        blocks = row_blocks(rows, self.groups.size, self.node_size)
        return blocks.rows_GM[self._local_rank][self._node], columns

    def _path(
        self,
        stages: Stages,
        rows: int,
        buffers: MatrixBuffers,
        count: Callable[[int, int], None],
    ) -> DataPath:
        blocks = row_blocks(rows, self.groups.size, self.node_size)
        return DataPath(self._node, self._local_rank, stages, blocks, buffers, count)

    def restore_index_of(self, index: LayoutIndex, before: LayoutIndex | None) -> RestoreIndex:
        kept = None if before is None else before.placed
        return index.for_restore(kept, self.node_size, self.groups.rank)

    def reduce_index_of(self, index: LayoutIndex) -> ReduceIndex:
        return index.for_reduce(self.node_size, self.groups.rank)

    def geometry_of(self, index: LayoutIndex) -> Geometry:
        geometry = index.placed.geometry
        if geometry.node_size == self.node_size:
            return geometry
        return replace(geometry, node_size=self.node_size)


def result_of_restore(
    source: torch.Tensor | Sequence[torch.Tensor],
    index: LayoutIndex,
    rows: int,
    reuse: ReusableWeights | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Return the tensor [C, R, K] to restore to: `out`, the reused one, or a new one.

    `source` is a matrix, or its rows, of one expert or several, or a sequence of such. One is read
    only for a new tensor.
    """
    assert reuse is None or out is None, "reused weights are updated in place"
    out_CRK = out if reuse is None else reuse.matrix_CRK
    slots = index.placed.geometry.replica_slots
    if out_CRK is None:
        of_one = source if isinstance(source, torch.Tensor) else source[0]
        out_CRK = of_one.new_empty((slots, rows, of_one.shape[-1]))
    assert out_CRK.shape[:2] == (slots, rows) and out_CRK.is_contiguous()
    return out_CRK


def flat_exchange(groups: FSEPGroups) -> HierarchicalExchange:
    """Create the exchange that runs one All-to-All over the whole group.

    A restore receives C·(R - r)·K elements from other ranks under any layout; a reduce sends as
    many.
    """

    def stages(group: Group) -> Stages:
        return Stages(None, whole_group(groups, group) if groups.size > 1 else None)

    return HierarchicalExchange(
        groups, groups.size, stages(groups.parameters), stages(groups.gradients)
    )


def node_exchange(
    groups: FSEPGroups, grad_wire_dtype: torch.dtype | None = None
) -> HierarchicalExchange:
    """Create the exchange that crosses nodes once for each distinct expert of a node.

    Restores equal those of `flat_exchange` bit for bit. Reduces sum the same n replicas with other
    roundings:

        |node - flat| <= (u_wire + 2·u_grad + 2·n·2**-24)·Σ|replica|

    Here u = 2**-8 for bfloat16, 2**-11 for float16, and 0 for float32, whose roundings are in the
    last term. Float16 adds n·2**-24 for underflow.

    Args:
        grad_wire_dtype: of gradients between nodes only; overrides a reduce's.
    """
    return HierarchicalExchange(
        groups,
        groups.node_size,
        _node_stages(
            groups, groups.parameters, groups.parameters_inter_node, groups.parameters_intra_node
        ),
        _node_stages(
            groups, groups.gradients, groups.gradients_inter_node, groups.gradients_intra_node
        ),
        grad_wire_dtype,
    )


def wire_dtype(config: FSEPConfig) -> torch.dtype | None:
    """Return the dtype of gradients between nodes; None for a reduce's own."""
    return None if config.grad_wire_dtype is None else _WIRE_DTYPES[config.grad_wire_dtype]


def _node_stages(
    groups: FSEPGroups, whole: Group, inter_node: Group | None, intra_node: Group | None
) -> Stages:
    """Create the stages of nodes; one is omitted where nodes have a single rank or all ranks."""
    node, local_rank = divmod(groups.rank, groups.node_size)
    if groups.size == 1:
        return Stages(None, None)
    if groups.node_size == groups.size:
        return Stages(None, Stage(whole, groups.rank, slice(0, groups.size)))
    if groups.node_size == 1:
        return Stages(Stage(whole, groups.rank, slice(groups.rank, groups.rank + 1)), None)
    assert inter_node is not None and intra_node is not None
    return Stages(
        Stage(inter_node, node, slice(node, node + 1)),
        Stage(intra_node, local_rank, slice(0, groups.node_size)),
    )
