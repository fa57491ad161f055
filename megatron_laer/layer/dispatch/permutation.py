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

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.planner.splits import RankQuotas
from megatron_laer.runtime.comm.copies import upload
from megatron_laer.runtime.comm.rows import kernels_of


@dataclass(frozen=True, eq=False)
class SendRows:
    """Holds what the rows of a send buffer are.

    Attributes:
        pair_P: of each row, the place of its pair in the router's map [T, E].
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
        return hidden_PH, probs_TE.reshape(-1).index_select(0, sent.pair_P)

    def by_slot(self, arrived: torch.Tensor) -> torch.Tensor:
        """Sort rows that arrived, [R, ...], from (source rank, slot) by (slot, source rank)."""
        return reorder(arrived, self.arrived_R, self.sorted_R)

    def by_rank(self, rows: torch.Tensor) -> torch.Tensor:
        """Sort rows, [R, ...], from (slot, source rank) by (source rank, slot)."""
        return reorder(rows, self.sorted_R, self.arrived_R)

    def combine(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        """Add up each token's rows of what came back, to [T, H]."""
        sent = self.sent
        combined: torch.Tensor = _Sum.apply(
            hidden_PH, self.num_tokens, sent.token_P, sent.ends_T, sent.by_token_P
        )
        return combined


def slot_permutation(routing_map_TE: torch.Tensor, quotas: RankQuotas) -> SlotPermutation:
    """Find the rows between which tokens move, without waiting for the device.

    Deterministic: replicas of an expert take consecutive runs of its tokens, in slot order.

    Args:
        routing_map_TE: bool, the router's.
        quotas: this rank's.
    """
    device, kernels = routing_map_TE.device, _kernels(routing_map_TE)
    sizes = run_sizes(quotas.row_S.size, routing_map_TE.shape[1])
    runs = torch.from_numpy(quotas.runs)
    if kernels is None:
        find, wanted = send_rows, runs[sum(sizes[:5]) :]
        shifts, counts, *send = upload(wanted, device).split(sizes[5:])
    else:
        find, wanted = kernels.send_rows, runs[: sum(sizes[:7])]
        *send, shifts, counts = upload(wanted, device).split(sizes[:7])
    num_received = quotas.num_received
    rows_2R = rows_of_runs(shifts, counts, 2 * num_received)
    sent = SendRows(*find(routing_map_TE, quotas.num_sent, *send))
    return SlotPermutation(sent, len(routing_map_TE), *rows_2R.split([num_received] * 2))


def run_sizes(num_slots: int, num_experts: int) -> list[int]:
    """Return the lengths of the parts of `RankQuotas.runs`, which `reference.token_runs` defines.

    The first five are what `kernels.send_rows` asks of slots, then come the shifts and counts of
    arrivals, then those of `send_rows`.
    """
    return [*[num_slots] * 4, num_experts + 1, *[2 * num_slots] * 2, *[num_slots] * 2]


def slot_ranges(quotas: RankQuotas) -> npt.NDArray[np.int32]:
    """Give each slot its share of its expert's tokens, as a half-open range of their places.

    Tokens of an expert are numbered in token order; its replicas take consecutive runs of them, in
    slot order.

    Returns:
        int32 [2, S], the starts and the ends.
    """
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


def reorder(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Take row `order[i]` for row i, in autograd; `inverse` undoes it."""
    ordered: torch.Tensor = _Reorder.apply(rows, order, inverse)
    return ordered


def rows_of_runs(shifts_X: torch.Tensor, counts_X: torch.Tensor, total: int) -> torch.Tensor:
    """Return for each row its number plus its run's shift, int32 of the runs' sum of counts."""
    rows = torch.repeat_interleave(shifts_X, counts_X, output_size=total)
    return rows.add_(torch.arange(total, dtype=rows.dtype, device=rows.device))


def true_places(flags: torch.Tensor, count: int) -> torch.Tensor:
    """Return where flags are true, int64 [count], as places in the flags read row by row.

    `nonzero_static` is the same, but on CUDA torch 2.6 lacks it, and some later versions crash
    where there are no flags.

    Args:
        flags: bool.
        count: how many are true; the device is not asked.
    """
    dtype = torch.int32 if flags.numel() < 2**31 else torch.int64
    return torch.repeat_interleave(flags.reshape(-1).to(dtype), output_size=count).long()


def _kernels(tensor: torch.Tensor) -> Any:
    return kernels_of("megatron_laer.layer.dispatch", tensor.device)


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
