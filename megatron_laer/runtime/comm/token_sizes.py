"""Ranks tell each other how many rows of tokens they send; this is a layer's second wait.

The first one is for counts (`collectives`), from which the numbers of (token, expert) pairs follow.
How many distinct tokens go to a rank, and how many to a node, does not follow from counts.

Legend: N ranks, M nodes, Z = N + M where rows go to nodes first, otherwise N; X sizes sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from megatron_laer.planner.token_rows import SizeMessages, TokenRows
from megatron_laer.runtime.comm.download import Download
from megatron_laer.runtime.comm.process_groups import FSEPGroups


class TokenSizesExchange:
    """Tells each rank the numbers of rows that it needs, while the host may enqueue other work."""

    def __init__(self, groups: FSEPGroups, device: torch.device) -> None:
        self._group = groups.tokens
        self._messages = SizeMessages(groups.rank, groups.size, groups.node_size)
        places_X = [place for message in self._messages.sent for place in message]
        self._places_X = torch.tensor(places_X, device=device)
        self._sent_N = [len(message) for message in self._messages.sent]
        self._received_N = [len(message) for message in self._messages.received]
        self._download = Download(device)

    def start(self, sizes_Z: torch.Tensor) -> Callable[[], TokenRows]:
        """Start the exchange: one All-to-All of a few integers, and one copy to the host.

        Args:
            sizes_Z: int32, this rank's rows to each rank, then those to each node.

        Returns:
            A function that waits for the copy, and returns this rank's rows.
        """
        told_X = sizes_Z.index_select(0, self._places_X)
        received = sizes_Z.new_empty(sum(self._received_N))
        dist.all_to_all_single(received, told_X, self._received_N, self._sent_N, group=self._group)
        return partial(self._wait_for_token_sizes, self._download.start(received))

    def _wait_for_token_sizes(self, read: Callable[[], torch.Tensor]) -> TokenRows:
        return self._messages.rows(read().long().numpy())
