"""Restore and reduce by one All-to-All each over the whole group; `node_exchange` minds nodes.

Legend: C slots per rank; R rows of a matrix, r rows of the slice that one rank holds, K columns.
"""

from __future__ import annotations

from megatron_laer.runtime.comm.hierarchical import HierarchicalExchange, Leg
from megatron_laer.runtime.comm.process_groups import FSEPGroups


class FlatExchange(HierarchicalExchange):
    """Restore and reduce by one All-to-All over the group: one span.

    A restore receives C·R·K elements of which C·(R - r)·K come from other ranks; a reduce sends as
    many. Neither depends on the layout.
    """

    def __init__(self, groups: FSEPGroups) -> None:
        first = groups.rank - groups.rank % groups.node_size
        near = slice(first, first + groups.node_size)
        legs = [
            Leg(group, groups.rank, near) if groups.size > 1 else None
            for group in (groups.parameters, groups.gradients)
        ]
        super().__init__(groups, groups.size, (None, legs[0]), (None, legs[1]))
