"""Ranks tell each other how many rows of tokens they send; this is a layer's second wait.

The first one is for counts (`collectives`), from which the numbers of (token, expert) pairs follow.
How many distinct tokens go to a rank, and how many to a node, does not follow from counts.

Legend: N ranks, M nodes, Z = N + M where rows go to nodes first, otherwise N.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from megatron_laer.planner.token_rows import TokenRows
from megatron_laer.runtime.comm.download import Download
from megatron_laer.runtime.comm.process_groups import FSEPGroups


class TokenSizesExchange:
    """Gathers every rank's numbers of rows, while the host may enqueue other work."""

    def __init__(self, groups: FSEPGroups, device: torch.device) -> None:
        self._groups = groups
        self._download = Download(device)

    def start(self, sizes_Z: torch.Tensor) -> Callable[[], TokenRows]:
        """Start the exchange: one All-gather of N·Z integers and one copy to the host.

        Args:
            sizes_Z: int32, this rank's rows to each rank, then those to each node.

        Returns:
            A function that waits for the copy, and returns the numbers of all ranks.
        """
        gathered = sizes_Z.new_empty(self._groups.size * len(sizes_Z))
        dist.all_gather_into_tensor(gathered, sizes_Z, group=self._groups.tokens)
        return partial(self._wait_for_token_sizes, self._download.start(gathered))

    def _wait_for_token_sizes(self, read: Callable[[], torch.Tensor]) -> TokenRows:
        num_ranks = self._groups.size
        sizes_NZ = read().view(num_ranks, -1).long().numpy()
        return TokenRows(sizes_NZ[:, :num_ranks], sizes_NZ[:, num_ranks:], self._groups.node_size)
