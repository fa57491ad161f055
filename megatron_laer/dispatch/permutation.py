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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.arrays import Int64
from megatron_laer.dispatch.slots import slot_ranges
from megatron_laer.runtime.comm.upload import upload

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    device, (num_tokens, num_experts) = routing_map_TE.device, routing_map_TE.shape
    sent, received = int(row_S.sum()), int(columns_NC.sum())
    topk = sent // max(num_tokens, 1)
    assert sent == num_tokens * topk, f"{sent} pairs of {num_tokens} tokens: a token lacks experts"
    kernels = _kernels(device)
    send_runs = (
        places(row_S, slot_expert_S, num_experts)
        if kernels is not None
        else sources(row_S, slot_expert_S)
    )
    shifts, counts, *send = _upload((*arrivals(columns_NC), *send_runs), device)
    find: Callable[..., Tensors] = send_rows if kernels is None else kernels.send_rows
    arrived_R, sorted_R = _rows_of_runs(shifts, counts, 2 * received).split([received, received])
    pair_P, token_P, rows_TK = find(routing_map_TE, *send, topk)
    return SlotPermutation(pair_P, token_P, rows_TK, arrived_R, sorted_R)


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
    routing_map_TE: torch.Tensor, shifts_S: torch.Tensor, counts_S: torch.Tensor, topk: int
) -> Tensors:
    """Find the pair and the token of every row of the send buffer, and the rows of each token."""
    num_tokens = routing_map_TE.shape[0]
    by_expert_P = _rows_of_runs(shifts_S, counts_S, num_tokens * topk)
    pairs_P = routing_map_TE.t().reshape(-1).nonzero_static(size=num_tokens * topk).view(-1)
    pair_P = pairs_P.index_select(0, by_expert_P)
    token_P = pair_P % max(num_tokens, 1)
    return pair_P, token_P, token_P.argsort(stable=True).view(num_tokens, topk)


def sum_rows(rows_PH: torch.Tensor, rows_TK: torch.Tensor) -> torch.Tensor:
    """Sum K rows for each token, in fp32 where they are narrower, in an order fixed by shapes."""
    if rows_TK.shape[1] == 1:
        return rows_PH.index_select(0, rows_TK.view(-1))
    if (kernels := _kernels(rows_PH.device)) is not None:
        summed: torch.Tensor = kernels.sum_rows(rows_PH, rows_TK)
        return summed
    gathered = rows_PH.index_select(0, rows_TK.view(-1))
    return gathered.view(*rows_TK.shape, *rows_PH.shape[1:]).sum(dim=1)


def _starts(counts: Int64) -> Int64:
    starts: Int64 = np.cumsum(counts) - counts
    return starts


def _rows_of_runs(shifts_X: torch.Tensor, counts_X: torch.Tensor, total: int) -> torch.Tensor:
    rows = torch.repeat_interleave(shifts_X, counts_X, output_size=total)
    return rows.add_(torch.arange(total, dtype=rows.dtype, device=rows.device))


def _upload(arrays: Sequence[npt.NDArray[np.integer]], device: torch.device) -> list[torch.Tensor]:
    packed = torch.from_numpy(np.concatenate(arrays).astype(np.int32))
    return list(upload(packed, device).split([len(array) for array in arrays]))


@cache
def _kernels(device: torch.device) -> Any:
    """Return the module of Triton kernels, or None where they cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module("megatron_laer.dispatch.kernels")


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
