"""Pairs of experts that tokens choose together: counted on the device, summed over the group.

Each rank adds up its microbatches of a step. At the step's end the sums cross once, to the planner
rank, which reads them before the next step. The diagonal has each expert's tokens.

Legend: T tokens, E experts or home positions, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_laer.arrays import Bool, Int64
from megatron_laer.runtime.comm.copies import Download
from megatron_laer.runtime.comm.process_groups import FSEPGroups


def count_pairs(routing_map_TE: torch.Tensor) -> torch.Tensor:
    """Count the tokens that chose both of two experts, int64 [E, E], of a bool map.

    Products are exact: float32 holds every sum up to 2**24 tokens, and TF32 holds 0 and 1.
    """
    chosen_TE = routing_map_TE.to(torch.float32)
    return (chosen_TE.T @ chosen_TE).to(torch.int64)


class PairCounts:
    """Pairs of every layer in each `interval`-th step, and the experts of some tokens.

    `sampled` tokens of each rank are spread evenly over its first microbatch. `sent_bytes` are
    those that this rank has sent to the planner rank.
    """

    def __init__(
        self,
        groups: FSEPGroups,
        device: torch.device,
        num_experts: int,
        interval: int | None,
        sampled: int = 0,
    ) -> None:
        self.sent_bytes = 0
        self._groups = groups
        self._device = device
        self._num_experts = num_experts
        self._interval = interval
        self._sampled = sampled
        self._is_counted = False
        # Pairs, int64 [L, E, E], and bits of sets, uint8 [L, T, E] with every rank's rows in turn.
        self._tables: list[torch.Tensor] = []
        self._downloads = Download(device), Download(device)
        self._reads: list[Callable[[], torch.Tensor]] = []

    def begin_step(self, step: int, num_layers: int) -> None:
        interval, experts = self._interval, self._num_experts
        self._is_counted = interval is not None and num_layers > 0 and step % interval == 0
        if self._is_counted and not self._tables:
            sets = num_layers, self._groups.size * self._sampled, experts
            self._tables = [
                torch.zeros((num_layers, experts, experts), dtype=torch.int64, device=self._device),
                torch.zeros(sets, dtype=torch.uint8, device=self._device),
            ]

    @torch.no_grad()
    def add(self, layer: int, routing_map_TE: torch.Tensor, *, begins: bool) -> None:
        """Add a pass of a layer; one that `begins` a step replaces those before a repeated step."""
        if not self._is_counted:
            return
        pairs_EE, chosen_TE = (table[layer] for table in self._tables)
        if not begins:
            pairs_EE.add_(count_pairs(routing_map_TE))
            return
        pairs_EE.copy_(count_pairs(routing_map_TE))
        if self._sampled:
            every = -(-len(routing_map_TE) // self._sampled) or 1
            mine_TE = routing_map_TE[::every]
            first = self._groups.rank * self._sampled
            chosen_TE.zero_()
            chosen_TE[first : first + len(mine_TE)].copy_(mine_TE)

    def end_step(self) -> None:
        """Sum the step's pairs over the group, if they are counted. Collective then."""
        if not self._is_counted:
            return
        self._is_counted = False
        # Each row of the sets is one rank's, so that their sum collects them.
        for table, download in zip(self._tables, self._downloads, strict=True):
            if table.numel():
                dist.reduce(table, dst=self._groups.planner_rank, group=self._groups.tokens)
            if self._groups.rank == 0:
                self._reads.append(download.start(table))
            else:
                self.sent_bytes += table.numel() * table.itemsize

    def take(self) -> tuple[Int64, Bool] | None:
        """Return the group's sums of the last step, [L, E, E], and sets, [L, T, E], once.

        A row of a set without experts is no token. None on other ranks than the planner rank.
        """
        if not self._reads:
            return None
        pairs_LEE, chosen_LTE = (read().numpy() for read in self._reads)
        self._reads = []
        return pairs_LEE.copy(), chosen_LTE != 0
