"""Permutations of tokens around the experts, in closed form from the plan's sizes.

Three orders of (token, expert) pairs matter on a rank. Between two of them, the rows of a run shift
by the same number:

* by expert, then token: the order in which the router's map is read,
* by slot, then token: the send buffer, for slots are in rank order,
* by slot, then source rank: the experts' input, which arrives by source rank, then slot.

So one gather makes the send buffer, one sorts the arrivals, and combine sums the rows of each token
in slot order. There is no map [T, S], no sort of one, and on CUDA nothing is atomic.

Legend: N ranks, T tokens, E experts, C slots per rank, S = N·C slots. P pairs that are sent, R
pairs that are received, X runs of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.layer.dispatch.row_map import RowMap, dispatch_kernels
from megatron_laer.planner.splits import RankQuotas


@dataclass(frozen=True, eq=False)
class SlotPermutation:
    """Moves of one rank's rows in one microbatch of one layer.

    Attributes:
        pair_P: the pair of each row of the send buffer, as a position in the router's map [T, E].
        sent: the map of tokens to rows of the send buffer, those of a token in slot order.
        arrivals: shifts and counts of the runs of arrivals, for `num_received` rows, R.
    """

    pair_P: torch.Tensor
    sent: RowMap
    arrivals: tuple[torch.Tensor, torch.Tensor]
    num_received: int

    def to_send(
        self, hidden_TH: torch.Tensor, probs_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the send buffer, [P, H], and its probabilities, [P]."""
        return self.sent.spread(hidden_TH), probs_TE.reshape(-1).index_select(0, self.pair_P)

    def by_slot(self, arrived: torch.Tensor) -> torch.Tensor:
        """Sort arrivals, [R, ...], from (source rank, slot) by (slot, source rank)."""
        return reorder(arrived, self.arrived_R, self.sorted_R)

    def by_rank(self, rows: torch.Tensor) -> torch.Tensor:
        """Sort rows, [R, ...], from (slot, source rank) by (source rank, slot)."""
        return reorder(rows, self.sorted_R, self.arrived_R)

    def combine(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        return self.sent.collect(hidden_PH)

    @property
    def arrived_R(self) -> torch.Tensor:
        """Return the row among arrivals of each row in the experts' order."""
        return self._rows_2R[: self.num_received]

    @property
    def sorted_R(self) -> torch.Tensor:
        """Return the inverse of `arrived_R`."""
        return self._rows_2R[self.num_received :]

    @cached_property
    def _rows_2R(self) -> torch.Tensor:
        """Launched at the first use, which is behind the dispatch."""
        return rows_of_runs(*self.arrivals, 2 * self.num_received)


def slot_permutation(
    routing_map_TE: torch.Tensor,
    quotas: RankQuotas,
    runs: torch.Tensor,
    ends_T: torch.Tensor | None = None,
) -> SlotPermutation:
    """Find the moves of a rank's rows, deterministically and without waiting for the device.

    Args:
        runs: `quotas.runs` on the device.
        ends_T: `kernels.token_ends` of the map, if it was launched before.
    """
    kernels, num_sent = dispatch_kernels(routing_map_TE), quotas.num_sent
    parts = runs.split(run_sizes(quotas.row_S.size, routing_map_TE.shape[1]))
    found: tuple[torch.Tensor, ...]
    if kernels is None:
        found = send_rows(routing_map_TE, num_sent, *parts[7:])
    else:
        found = kernels.send_rows(routing_map_TE, num_sent, *parts[:5], ends_T=ends_T)
    sent = RowMap(found[1], len(routing_map_TE), *found[2:])
    return SlotPermutation(found[0], sent, (parts[5], parts[6]), quotas.num_received)


def run_sizes(num_slots: int, num_experts: int) -> list[int]:
    """Return the lengths of the parts of `RankQuotas.runs`, which `reference.token_runs` defines.

    In order: five parts for `kernels.send_rows`, shifts and counts of arrivals, those of
    `send_rows`.
    """
    return [*[num_slots] * 4, num_experts + 1, *[2 * num_slots] * 2, *[num_slots] * 2]


def slot_ranges(quotas: RankQuotas) -> npt.NDArray[np.int32]:
    """Return the starts and ends of each slot's run among its expert's tokens, int32 [2, S]."""
    ranges_2S: npt.NDArray[np.int32] = quotas.runs[: 2 * quotas.row_S.size].reshape(2, -1)
    return ranges_2S


def send_rows(
    routing_map_TE: torch.Tensor, num_sent: int, shifts_S: torch.Tensor, counts_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the pair and the token of every row of the send buffer."""
    by_expert_P = rows_of_runs(shifts_S, counts_S, num_sent)
    pairs_P = true_places(routing_map_TE.t(), num_sent)
    num_tokens, num_experts = routing_map_TE.shape
    pair_P = pairs_P.index_select(0, by_expert_P)
    token_P = pair_P % max(num_tokens, 1)
    return token_P * num_experts + pair_P // max(num_tokens, 1), token_P


def reorder(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return row `order[i]` for row i, in autograd; `inverse` undoes it."""
    ordered: torch.Tensor = _Reorder.apply(rows, order, inverse)
    return ordered


def rows_of_runs(shifts_X: torch.Tensor, counts_X: torch.Tensor, total: int) -> torch.Tensor:
    """Return for each row its number plus its run's shift, int32 of the runs' sum of counts."""
    rows = torch.repeat_interleave(shifts_X, counts_X, output_size=total)
    return rows.add_(torch.arange(total, dtype=rows.dtype, device=rows.device))


def true_places(flags: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions of the `count` true flags, row by row, without waiting for the device.

    `nonzero_static` lacks CUDA in torch 2.6, and crashes without flags in some later versions.
    """
    dtype = torch.int32 if flags.numel() < 2**31 else torch.int64
    return torch.repeat_interleave(flags.reshape(-1).to(dtype), output_size=count).long()


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
