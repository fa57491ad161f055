"""`TokenRows` says how many rows of hidden states ranks send each other in one microbatch's layer.

A token that goes to several slots of a rank is one row to that rank, and one that goes to several
ranks of a node is one row to that node. From the numbers of all ranks each rank knows its sizes in
both stages of the exchange. Nothing is sent here.

Legend: N ranks, G ranks per node, M = N/G nodes; rank n = J·G + g is local rank g of node J.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_laer.arrays import Int64


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Holds the numbers of rows that every rank sends.

    Attributes:
        to_ranks_NN: distinct tokens of each source rank that go to each rank.
        to_nodes_NM: distinct tokens of each source rank that go to each node; of no meaning where
            the exchange has one stage.
        node_size: G.
    """

    to_ranks_NN: Int64
    to_nodes_NM: Int64
    node_size: int

    @property
    def has_two_stages(self) -> bool:
        """Tell whether rows go to nodes first, and to ranks in a second exchange."""
        return 1 < self.node_size < len(self.to_ranks_NN)

    def first_sent(self, rank: int) -> list[int]:
        """Return the rows that a rank sends in the first stage.

        With two stages that is to the rank with its local rank on every node, otherwise to all
        ranks.
        """
        return _numbers(self.to_nodes_NM[rank] if self.has_two_stages else self.to_ranks_NN[rank])

    def first_received(self, rank: int) -> list[int]:
        """Return the rows that a rank receives in the first stage, from where it sends some."""
        if self.has_two_stages:
            node, local_rank = divmod(rank, self.node_size)
            return _numbers(self.to_nodes_NM[local_rank :: self.node_size, node])
        return _numbers(self.to_ranks_NN[:, rank])

    def second_sent(self, rank: int) -> list[int]:
        """Return the rows that a rank passes on to each local rank of its node."""
        node, local_rank = divmod(rank, self.node_size)
        of_node = slice(node * self.node_size, (node + 1) * self.node_size)
        return _numbers(self._passed_on_GN[local_rank, of_node])

    def second_received(self, rank: int) -> list[int]:
        """Return the rows that a rank is passed by each local rank of its node."""
        return _numbers(self._passed_on_GN[:, rank])

    def arrived(self, rank: int) -> int:
        """Count the rows that are at a rank after the last stage."""
        return int(self.to_ranks_NN[:, rank].sum())

    def starts_N(self, rank: int) -> Int64:
        """Return where the rows of each source rank start among those that arrived at a rank.

        With two stages they come by the local rank that passed them on, then by node.
        """
        order_N = np.arange(len(self.to_ranks_NN))
        if self.has_two_stages:
            order_N = order_N.reshape(-1, self.node_size).T.ravel()
        counts_N = self.to_ranks_NN[order_N, rank]
        starts_N: Int64 = np.empty_like(counts_N)
        starts_N[order_N] = np.cumsum(counts_N) - counts_N
        return starts_N

    @cached_property
    def _passed_on_GN(self) -> Int64:
        """Sum the rows to each rank over the sources that one local rank stands for."""
        num_ranks = len(self.to_ranks_NN)
        passed_on_GN: Int64 = self.to_ranks_NN.reshape(-1, self.node_size, num_ranks).sum(axis=0)
        return passed_on_GN


def _numbers(array: Int64) -> list[int]:
    numbers: list[int] = array.tolist()
    return numbers
