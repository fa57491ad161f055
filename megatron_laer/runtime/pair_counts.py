"""Pairs of experts that tokens choose together: counted on the device, summed over the group.

Each rank adds up its microbatches of a step. At the step's end the sums cross once, to the planner
rank, which reads them before the next step. The diagonal has each expert's tokens.

Legend: T tokens, E experts or home positions, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_laer.arrays import Int64
from megatron_laer.runtime.comm.copies import Download
from megatron_laer.runtime.comm.process_groups import FSEPGroups


def count_pairs(routing_map_TE: torch.Tensor) -> torch.Tensor:
    """Count the tokens that chose both of two experts, int64 [E, E], of a bool map.

    Products are exact: float32 holds every sum up to 2**24 tokens, and TF32 holds 0 and 1.
    """
    chosen_TE = routing_map_TE.to(torch.float32)
    return (chosen_TE.T @ chosen_TE).to(torch.int64)


class PairCounts:
    """Pairs of every layer in each `interval`-th step.

    `sent_bytes` are those that this rank has sent to the planner rank.
    """

    def __init__(
        self, groups: FSEPGroups, device: torch.device, num_experts: int, interval: int | None
    ) -> None:
        self.sent_bytes = 0
        self._groups = groups
        self._device = device
        self._num_experts = num_experts
        self._interval = interval
        self._is_counted = False
        self._pairs_LEE: torch.Tensor | None = None
        self._download = Download(device)
        self._read: Callable[[], torch.Tensor] | None = None

    def begin_step(self, step: int, num_layers: int) -> None:
        interval = self._interval
        self._is_counted = interval is not None and num_layers > 0 and step % interval == 0
        if self._is_counted and self._pairs_LEE is None:
            shape = num_layers, self._num_experts, self._num_experts
            self._pairs_LEE = torch.zeros(shape, dtype=torch.int64, device=self._device)

    @torch.no_grad()
    def add(self, layer: int, routing_map_TE: torch.Tensor, *, begins: bool) -> None:
        """Add a pass of a layer; one that `begins` a step replaces those before a repeated step."""
        if self._is_counted:
            assert self._pairs_LEE is not None
            pairs_EE = count_pairs(routing_map_TE)
            if begins:
                self._pairs_LEE[layer].copy_(pairs_EE)
            else:
                self._pairs_LEE[layer].add_(pairs_EE)

    def end_step(self) -> None:
        """Sum the step's pairs over the group, if they are counted. Collective then."""
        if not self._is_counted:
            return
        pairs_LEE, self._is_counted = self._pairs_LEE, False
        assert pairs_LEE is not None
        dist.reduce(pairs_LEE, dst=self._groups.planner_rank, group=self._groups.tokens)
        if self._groups.rank == 0:
            self._read = self._download.start(pairs_LEE)
        else:
            self.sent_bytes += pairs_LEE.numel() * pairs_LEE.itemsize

    def take(self) -> Int64 | None:
        """Return the group's sums of the last step, [L, E, E], once; None on other ranks."""
        read, self._read = self._read, None
        if read is None:
            return None
        summed_LEE: Int64 = read().numpy()
        return summed_LEE
