"""Rows of hidden states that a rank exchanges in one microbatch's layer.

A token for several slots of a rank is one row to that rank. One for several ranks of a node is one
row to that node. A rank counts the rows that it sends, its *sizes*, and needs some of the others',
which `SizeMessages` lists. Nothing is sent here.

Legend: N ranks, G ranks per node, M = N/G nodes; rank n = J·G + g is local rank g of node J. Z
sizes of a rank: rows to each rank and then, with two stages, to each node; X sizes received.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_laer.arrays import Int64


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Numbers of rows that a rank sends and receives.

    The first of two stages is among the ranks with one local rank, the second among the ranks of a
    node. A single stage is among all ranks, and the lists of the second are empty.

    Attributes:
        first_sent, first_received: rows to and from each rank of the first stage.
        second_sent, second_received: rows to and from each local rank of the node.
        from_ranks_N: distinct tokens of each source rank for this rank.
    """

    first_sent: list[int]
    first_received: list[int]
    second_sent: list[int]
    second_received: list[int]
    from_ranks_N: Int64

    @property
    def has_two_stages(self) -> bool:
        return bool(self.second_sent)

    @property
    def arrived(self) -> int:
        """Return the number of rows at the rank after the last stage."""
        return int(self.from_ranks_N.sum())

    @property
    def starts_N(self) -> Int64:
        """Return the first row of each source rank among those that arrived.

        With two stages, rows are ordered by the local rank that passed them on, then by node.
        """
        order_N = np.arange(len(self.from_ranks_N))
        if self.has_two_stages:
            order_N = order_N.reshape(-1, len(self.second_sent)).T.ravel()
        counts_N = self.from_ranks_N[order_N]
        starts_N: Int64 = np.empty_like(counts_N)
        starts_N[order_N] = np.cumsum(counts_N) - counts_N
        return starts_N


@dataclass(frozen=True)
class SizeMessages:
    """Places of the sizes that ranks send to each other.

    Each rank receives the sizes of the rows for itself, and its message to itself has all its
    sizes. With two stages, ranks with its own local rank also send it the sizes of rows for its
    node. They add those for each rank of the node, to which it passes rows on.
    """

    rank: int
    num_ranks: int
    node_size: int

    @cached_property
    def sent(self) -> list[list[int]]:
        """Return the places, among this rank's sizes, of those for each rank."""
        return [self._told(self.rank, target) for target in range(self.num_ranks)]

    @cached_property
    def received(self) -> list[list[int]]:
        """Return the places, among each rank's sizes, of those for this rank."""
        return [self._told(source, self.rank) for source in range(self.num_ranks)]

    def rows(self, sizes_X: Int64) -> TokenRows:
        """Return the rank's rows from all ranks' messages to it, rank after rank."""
        from_ranks_N = sizes_X[self._of_ranks_N]
        first_sent = _numbers(sizes_X[self._own])
        if not self._has_two_stages:
            return TokenRows(first_sent, _numbers(from_ranks_N), [], [], from_ranks_N)
        return TokenRows(
            first_sent,
            _numbers(sizes_X[self._of_node_M]),
            _numbers(sizes_X[self._passed_on_MG].sum(axis=0)),
            _numbers(from_ranks_N.reshape(-1, self.node_size).sum(axis=0)),
            from_ranks_N,
        )

    @property
    def _has_two_stages(self) -> bool:
        return 1 < self.node_size < self.num_ranks

    @property
    def _node(self) -> int:
        return self.rank // self.node_size

    def _told(self, source: int, target: int) -> list[int]:
        num_ranks, size = self.num_ranks, self.node_size
        if source == target:
            return list(range(num_ranks + (num_ranks // size if self._has_two_stages else 0)))
        if not self._has_two_stages or source % size != target % size:
            return [target]
        node = target // size
        return [num_ranks + node, *range(node * size, (node + 1) * size)]

    # Positions of sizes among those received.

    @cached_property
    def _at(self) -> dict[tuple[int, int], int]:
        """Map a source and the place of one of its sizes to the position of the size."""
        told = [(source, place) for source, of in enumerate(self.received) for place in of]
        return {key: at for at, key in enumerate(told)}

    @cached_property
    def _of_ranks_N(self) -> Int64:
        return np.array([self._at[source, self.rank] for source in range(self.num_ranks)])

    @cached_property
    def _own(self) -> Int64:
        """Return the positions of the rank's own first-stage sizes: to nodes, if any."""
        own = self.received[self.rank]
        to = own[self.num_ranks :] if self._has_two_stages else own
        return np.array([self._at[self.rank, place] for place in to])

    @property
    def _peers(self) -> range:
        """Return the ranks of the first of two stages: those with this local rank."""
        return range(self.rank % self.node_size, self.num_ranks, self.node_size)

    @cached_property
    def _of_node_M(self) -> Int64:
        place = self.num_ranks + self._node
        return np.array([self._at[peer, place] for peer in self._peers])

    @cached_property
    def _passed_on_MG(self) -> Int64:
        first = self._node * self.node_size
        return np.array(
            [
                [self._at[peer, target] for target in range(first, first + self.node_size)]
                for peer in self._peers
            ]
        )


def _numbers(array: Int64) -> list[int]:
    numbers: list[int] = array.tolist()
    return numbers
