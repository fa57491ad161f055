"""The permutations of tokens around the experts follow in closed form from the plan's sizes.

Three orders of (token, expert) pairs matter on a rank, and each pair's row in one is its row in
another plus a number that is the same for a whole run of rows:

* by expert, then token: the order in which the router's map is read,
* by slot, then token: the send buffer, for slots are in rank order,
* by slot, then source rank: what the experts compute with; it arrives by source rank, then slot.

So one gather makes the send buffer, one sorts what arrived, and combine is one gather and a sum
over each token's K rows in slot order. No [T, S] map, no sort of one, no atomics.

Legend: N ranks, T tokens, E experts, C slots per rank, S = N·C slots, K experts of a token,
P = T·K pairs that are sent, R pairs that are received, X runs of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.arrays import Int64
from megatron_laer.runtime.comm.upload import upload


@dataclass(frozen=True, eq=False)
class SlotPermutation:
    """Holds the rows between which one rank's tokens move in one microbatch of one layer.

    Attributes:
        pair_P: of each row to send, the place of its pair in the router's map [E, T].
        token_P: of each row to send, its token.
        rows_TK: of each token, its rows in the send buffer, in slot order.
        arrived_R: of each row in the experts' order, its row among those that arrived.
        sorted_R: the other way round.
    """

    pair_P: torch.Tensor
    token_P: torch.Tensor
    rows_TK: torch.Tensor
    arrived_R: torch.Tensor
    sorted_R: torch.Tensor

    def to_send(
        self, hidden_TH: torch.Tensor, probs_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the send buffer, [P, H], and its probabilities, [P]."""
        hidden_PH = _Gather.apply(hidden_TH, self.token_P, self.rows_TK)
        return hidden_PH, probs_TE.t().reshape(-1).index_select(0, self.pair_P)

    def by_slot(self, arrived: torch.Tensor) -> torch.Tensor:
        """Sort rows that arrived, [R, ...], from (source rank, slot) by (slot, source rank)."""
        sorted_: torch.Tensor = _Gather.apply(arrived, self.arrived_R, self.sorted_R[:, None])
        return sorted_

    def by_rank(self, sorted_: torch.Tensor) -> torch.Tensor:
        """Sort rows, [R, ...], from (slot, source rank) by (source rank, slot)."""
        back: torch.Tensor = _Gather.apply(sorted_, self.sorted_R, self.arrived_R[:, None])
        return back

    def combine(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        """Sum each token's rows of what came back, in slot order, to [T, H]."""
        combined: torch.Tensor = _Sum.apply(hidden_PH, self.token_P, self.rows_TK)
        return combined


def slot_permutation(
    routing_map_TE: torch.Tensor,
    row_S: Int64,
    slot_expert_S: npt.NDArray[np.int16],
    columns_NC: Int64,
) -> SlotPermutation:
    """Find the rows between which tokens move, without waiting for the device.

    Deterministic: replicas of an expert take consecutive runs of its tokens, in slot order.

    Args:
        routing_map_TE: bool, the router's; every token goes to the same number of experts.
        row_S: tokens that this rank sends to each slot.
        slot_expert_S: the expert in each slot.
        columns_NC: tokens that each rank sends to this rank's slots.
    """
    num_tokens = routing_map_TE.shape[0]
    sent, received = int(row_S.sum()), int(columns_NC.sum())
    topk = sent // max(num_tokens, 1)
    assert sent == num_tokens * topk, f"{sent} pairs of {num_tokens} tokens: a token lacks experts"
    runs_2X = upload(
        torch.from_numpy(run_shifts(row_S, slot_expert_S, columns_NC)), routing_map_TE.device
    )
    rows = torch.repeat_interleave(runs_2X[0], runs_2X[1], output_size=sent + 2 * received)
    rows += torch.arange(rows.numel(), dtype=rows.dtype, device=rows.device)
    mapped_P, arrived_R, sorted_R = rows.split([sent, received, received])
    pairs_P = routing_map_TE.t().reshape(-1).nonzero_static(size=sent).view(-1)
    pair_P = pairs_P.index_select(0, mapped_P)
    token_P = pair_P % max(num_tokens, 1)
    rows_TK = token_P.argsort(stable=True).view(num_tokens, topk)
    return SlotPermutation(pair_P, token_P, rows_TK, arrived_R, sorted_R)


def run_shifts(
    row_S: Int64, slot_expert_S: npt.NDArray[np.int16], columns_NC: Int64
) -> npt.NDArray[np.int32]:
    """Compute what to add to a row's number in one order to find it in another, by runs of rows.

    There are three lists of rows, one behind the other, and their rows are numbered through: the
    send buffer into the pairs by expert, rows by slot into those that arrived, and back.

    Returns:
        int32 [2, S + 2·N·C], the shift and the number of rows of each run.
    """
    sent, received = int(row_S.sum()), int(columns_NC.sum())
    by_expert_S = np.argsort(slot_expert_S, kind="stable")
    mapped_S = np.empty_like(row_S)
    mapped_S[by_expert_S] = _starts(row_S[by_expert_S])
    columns_CN = columns_NC.T
    arrived_NC = _starts(columns_NC.ravel()).reshape(columns_NC.shape)
    sorted_CN = _starts(columns_CN.ravel()).reshape(columns_CN.shape)
    arrived_CN, sorted_NC = arrived_NC.T, sorted_CN.T
    shifts = (
        mapped_S - _starts(row_S),
        (arrived_CN - sorted_CN).ravel() - sent,
        (sorted_NC - arrived_NC).ravel() - sent - received,
    )
    counts = (row_S, columns_CN.ravel(), columns_NC.ravel())
    return np.stack([np.concatenate(shifts), np.concatenate(counts)]).astype(np.int32)


def sum_rows(rows_PH: torch.Tensor, rows_TK: torch.Tensor) -> torch.Tensor:
    """Sum K rows for each token, in fp32 where they are narrower, in an order fixed by shapes."""
    gathered = rows_PH.index_select(0, rows_TK.reshape(-1))
    if rows_TK.shape[1] == 1:
        return gathered
    return gathered.view(*rows_TK.shape, *rows_PH.shape[1:]).sum(dim=1)


def _starts(counts: Int64) -> Int64:
    starts: Int64 = np.cumsum(counts) - counts
    return starts


class _Gather(torch.autograd.Function):
    """Takes row `index[i]` for row i; `uses` says which rows took each, for the gradients' sum."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, uses: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(uses)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (uses,) = ctx.saved_tensors
        return sum_rows(grad, uses), None, None


class _Sum(torch.autograd.Function):
    """Sums rows `uses[i]` for row i; `index` says into which sum each row went: its gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, uses: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(index)
        return sum_rows(rows, uses)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None
