"""The permutations of tokens around the experts follow in closed form from the plan's sizes.

Three orders of (token, expert) pairs matter on a rank, and each pair's row in one is its row in
another plus a number that is the same for a whole run of rows:

* by expert, then token: the order in which the router's map is read,
* by slot, then token: the send buffer, for slots are in rank order,
* by slot, then source rank: what the experts compute with; it arrives by source rank, then slot.

So one gather makes the send buffer, one sorts what arrived, and combine adds up the rows of each
token in slot order. There is no map [T, S], no sort of one, and on CUDA nothing is atomic.

Legend: N ranks, T tokens, E experts, C slots per rank, S = N·C slots, P pairs that are sent,
R pairs that are received, X runs of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.arrays import Int64
from megatron_laer.dispatch.slots import slot_ranges
from megatron_laer.runtime.comm.kernel_choice import kernels_of
from megatron_laer.runtime.comm.upload import upload


@dataclass(frozen=True, eq=False)
class SendRows:
    """Holds what the rows of a send buffer are.

    Attributes:
        pair_P: of each row, the place of its pair in the router's map [E, T].
        token_P: of each row, its token.
        ends_T: of each token, where its rows end in `by_token_P`; None where torch adds rows.
        by_token_P: rows in the order of tokens, those of a token in slot order; None likewise.
    """

    pair_P: torch.Tensor
    token_P: torch.Tensor
    ends_T: torch.Tensor | None = None
    by_token_P: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class SlotPermutation:
    """Holds the rows between which one rank's tokens move in one microbatch of one layer.

    Attributes:
        sent: the rows of the send buffer.
        num_tokens: T.
        arrived_R: of each row in the experts' order, its row among those that arrived.
        sorted_R: the other way round.
    """

    sent: SendRows
    num_tokens: int
    arrived_R: torch.Tensor
    sorted_R: torch.Tensor

    def to_send(
        self, hidden_TH: torch.Tensor, probs_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the send buffer, [P, H], and its probabilities, [P]."""
        sent = self.sent
        hidden_PH = _Gather.apply(hidden_TH, sent.token_P, sent.ends_T, sent.by_token_P)
        return hidden_PH, probs_TE.t().reshape(-1).index_select(0, sent.pair_P)

    def by_slot(self, arrived: torch.Tensor) -> torch.Tensor:
        """Sort rows that arrived, [R, ...], from (source rank, slot) by (slot, source rank)."""
        rows: torch.Tensor = _Reorder.apply(arrived, self.arrived_R, self.sorted_R)
        return rows

    def by_rank(self, rows: torch.Tensor) -> torch.Tensor:
        """Sort rows, [R, ...], from (slot, source rank) by (source rank, slot)."""
        back: torch.Tensor = _Reorder.apply(rows, self.sorted_R, self.arrived_R)
        return back

    def combine(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        """Add up each token's rows of what came back, to [T, H]."""
        sent = self.sent
        combined: torch.Tensor = _Sum.apply(
            hidden_PH, self.num_tokens, sent.token_P, sent.ends_T, sent.by_token_P
        )
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
        routing_map_TE: bool, the router's.
        row_S: tokens that this rank sends to each slot.
        slot_expert_S: the expert in each slot.
        columns_NC: tokens that each rank sends to this rank's slots.
    """
    device, num_experts = routing_map_TE.device, routing_map_TE.shape[1]
    num_sent, num_received = int(row_S.sum()), int(columns_NC.sum())
    kernels = _kernels(routing_map_TE)
    send_runs = (
        places(row_S, slot_expert_S, num_experts)
        if kernels is not None
        else sources(row_S, slot_expert_S)
    )
    shifts, counts, *send = _upload((*arrivals(columns_NC), *send_runs), device)
    rows_2R = _rows_of_runs(shifts, counts, 2 * num_received)
    find = send_rows if kernels is None else kernels.send_rows
    sent = SendRows(*find(routing_map_TE, num_sent, *send))
    return SlotPermutation(sent, len(routing_map_TE), *rows_2R.split([num_received] * 2))


def arrivals(columns_NC: Int64) -> tuple[Int64, Int64]:
    """Give the runs of rows by slot and of rows that arrived, numbered through, [2·N·C] each.

    Returns:
        What to add to a row's number to find it among the others, and the rows of each run.
    """
    columns_CN = columns_NC.T
    arrived_NC = _starts(columns_NC.ravel()).reshape(columns_NC.shape)
    sorted_CN = _starts(columns_CN.ravel()).reshape(columns_CN.shape)
    shifts = (arrived_NC.T - sorted_CN).ravel(), (sorted_CN.T - arrived_NC).ravel()
    return (
        np.concatenate((shifts[0], shifts[1] - columns_NC.sum())),
        np.concatenate((columns_CN.ravel(), columns_NC.ravel())),
    )


def sources(row_S: Int64, slot_expert_S: npt.NDArray[np.int16]) -> tuple[Int64, Int64]:
    """Give the runs of the send buffer, [S] each, for `send_rows`.

    Returns:
        What to add to a row's number to find its pair by expert, and the rows of each run.
    """
    by_expert_S = np.argsort(slot_expert_S, kind="stable")
    pair_S = np.empty_like(row_S)
    pair_S[by_expert_S] = _starts(row_S[by_expert_S])
    return pair_S - _starts(row_S), row_S


def places(
    row_S: Int64, slot_expert_S: npt.NDArray[np.int16], num_experts: int
) -> tuple[npt.NDArray[np.integer], ...]:
    """Give what `kernels.send_rows` must know of slots, from starts to the experts' first ones."""
    by_expert_S = np.argsort(slot_expert_S, kind="stable")
    first_E1 = np.searchsorted(slot_expert_S[by_expert_S], np.arange(num_experts + 1))
    return (*slot_ranges(row_S, slot_expert_S), _starts(row_S), by_expert_S, first_E1)


def send_rows(
    routing_map_TE: torch.Tensor, num_sent: int, shifts_S: torch.Tensor, counts_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the pair and the token of every row of the send buffer."""
    by_expert_P = _rows_of_runs(shifts_S, counts_S, num_sent)
    pairs_P = routing_map_TE.t().reshape(-1).nonzero_static(size=num_sent).view(-1)
    pair_P = pairs_P.index_select(0, by_expert_P)
    return pair_P, pair_P % max(len(routing_map_TE), 1)


def sum_rows(
    rows_PH: torch.Tensor,
    num_tokens: int,
    token_P: torch.Tensor,
    ends_T: torch.Tensor | None,
    by_token_P: torch.Tensor | None,
) -> torch.Tensor:
    """Add up the rows of each token in slot order, in fp32 where they are narrower."""
    if ends_T is None:
        return rows_PH.new_zeros(num_tokens, rows_PH.shape[1]).index_add_(0, token_P, rows_PH)
    summed: torch.Tensor = _kernels(rows_PH).sum_rows(rows_PH, ends_T, by_token_P)
    return summed


def _starts(counts: Int64) -> Int64:
    starts: Int64 = np.cumsum(counts) - counts
    return starts


def _rows_of_runs(shifts_X: torch.Tensor, counts_X: torch.Tensor, total: int) -> torch.Tensor:
    rows = torch.repeat_interleave(shifts_X, counts_X, output_size=total)
    return rows.add_(torch.arange(total, dtype=rows.dtype, device=rows.device))


def _upload(arrays: Sequence[npt.NDArray[np.integer]], device: torch.device) -> list[torch.Tensor]:
    packed = torch.from_numpy(np.concatenate(arrays).astype(np.int32))
    return list(upload(packed, device).split([len(array) for array in arrays]))


def _kernels(tensor: torch.Tensor) -> Any:
    return kernels_of("megatron_laer.dispatch", tensor.device)


class _Reorder(torch.autograd.Function):
    """Takes row `order[i]` for row i; `inverse` undoes it."""

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


class _Gather(torch.autograd.Function):
    """Takes each row's token; the gradient of a token is the sum of its rows' ones."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: torch.Tensor, *rows: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*rows)
        ctx.num_tokens = len(hidden_TH)
        token_P = rows[0]
        assert token_P is not None
        return hidden_TH.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return sum_rows(grad, ctx.num_tokens, *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    """Adds up each token's rows; the gradient of a row is its token's one."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_PH: torch.Tensor,
        num_tokens: int,
        token_P: torch.Tensor,
        *by_token: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(token_P)
        return sum_rows(rows_PH, num_tokens, token_P, *by_token)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (token_P,) = ctx.saved_tensors
        return grad.index_select(0, token_P), None, None, None, None
