"""Restore and reduce that cross nodes once for each distinct expert of a node.

Between nodes, each rank exchanges with the ranks at its own place of the other nodes; inside a
node, all ranks with each other. Gradients of a node's replicas are summed before they cross.

The collectives and sums themselves are in `hierarchical.HierarchicalExchange`.
"""

from __future__ import annotations

import torch

from megatron_laer.runtime.comm.hierarchical import HierarchicalExchange, Leg
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group


class NodeExchange(HierarchicalExchange):
    """Restore and reduce with one span per node.

    Restores equal `FlatExchange`'s bit for bit. Reduces add up the same replicas with other
    roundings: |node - flat| <= (u_wire + 2·u_grad + 2·n·2**-24)·Σ|replica|, where n is the number
    of replicas and u = 2**-8 for bfloat16, 2**-11 for float16; u_wire and u_grad are 0 for float32,
    whose roundings are in the last term. With float16 add n·2**-24 for what is too small for it.

    Args:
        grad_wire_dtype: of gradients between nodes, whatever a reduce says. Inside a node they keep
            their own.
    """

    def __init__(self, groups: FSEPGroups, grad_wire_dtype: torch.dtype | None = None) -> None:
        super().__init__(
            groups,
            groups.node_size,
            _legs(groups, groups.parameters, groups.parameters_across, groups.parameters_node),
            _legs(groups, groups.gradients, groups.gradients_across, groups.gradients_node),
            grad_wire_dtype,
        )


def _legs(
    groups: FSEPGroups, whole: Group, across: Group | None, inside: Group | None
) -> tuple[Leg | None, Leg | None]:
    """The legs across and inside; one of them is left out where nodes hold one rank, or all."""
    node, place = divmod(groups.rank, groups.node_size)
    if groups.size == 1:
        return None, None
    if groups.node_size == groups.size:
        return None, Leg(whole, groups.rank, slice(0, groups.size))
    if groups.node_size == 1:
        return Leg(whole, groups.rank, slice(groups.rank, groups.rank + 1)), None
    assert across is not None and inside is not None
    return (
        Leg(across, node, slice(node, node + 1)),
        Leg(inside, place, slice(0, groups.node_size)),
    )
