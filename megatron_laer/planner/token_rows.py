"""`TokenRows` says how many rows of hidden states a rank exchanges in one microbatch's layer.

A token that goes to several slots of a rank is one row to that rank, and one that goes to several
ranks of a node is one row to that node. A rank counts the rows that it sends, its *sizes*; of the
others' sizes it needs some, and `SizeMessages` says who tells whom which. Nothing is sent here.

Legend: N ranks, G ranks per node, M = N/G nodes; rank n = J·G + g is local rank g of node J; Z
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

    With two stages the first one is among the ranks with one local rank, of every node, and the
    second one among the ranks of a node; otherwise there is but a first one, among all ranks.

    Attributes:
        first_sent, first_received: to and from each rank of the first stage.
        second_sent, second_received: to and from each local rank of the node; empty with one stage.
        from_ranks_N: distinct tokens of each source rank that go to this rank.
    """

    first_sent: list[int]
    first_received: list[int]
    second_sent: list[int]
    second_received: list[int]
    from_ranks_N: Int64

    @property
    def has_two_stages(self) -> bool:
        """Whether rows go to nodes first, and to ranks in a second exchange."""
        return bool(self.second_sent)

    @property
    def arrived(self) -> int:
        """Number of rows at the rank after the last stage."""
        return int(self.from_ranks_N.sum())

    @property
    def starts_N(self) -> Int64:
        """Return where the rows of each source rank start among those that arrived.

        With two stages they come by the local rank that passed them on, then by node.
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

    Each rank hears of the rows for itself. With two stages it also hears, from the ranks with its
    own local rank, of the rows for its node, which it receives, and of those for each rank of the
    node, to which it passes them on. Itself a rank tells all of its sizes.
    """

    rank: int
    num_ranks: int
    node_size: int

    @cached_property
    def sent(self) -> list[list[int]]:
        """Return the places, among this rank's sizes, of those that it tells each rank."""
        return [self._told(self.rank, target) for target in range(self.num_ranks)]

    @cached_property
    def received(self) -> list[list[int]]:
        """Return the places, among each rank's sizes, of those that it tells this rank."""
        return [self._told(source, self.rank) for source in range(self.num_ranks)]

    def rows(self, sizes_X: Int64) -> TokenRows:
        """Return the rank's rows.

        Args:
            sizes_X: what all ranks told this one, rank after rank.
        """
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

    # Where sizes are among those received.

    @cached_property
    def _at(self) -> dict[tuple[int, int], int]:
        """Find a source's size, by the source and the size's place."""
        told = [(source, place) for source, of in enumerate(self.received) for place in of]
        return {key: at for at, key in enumerate(told)}

    @cached_property
    def _of_ranks_N(self) -> Int64:
        return np.array([self._at[source, self.rank] for source in range(self.num_ranks)])

    @cached_property
    def _own(self) -> Int64:
        """Find the rank's own sizes of the first stage: to nodes where there are two."""
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
