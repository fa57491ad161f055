"""Triton kernels of the token permutations; `permutation` has the torch code of each.

Every result has one writer, or is a count of integers, so bits never depend on timing. Numbers of
tokens and groups are not specialised, so that other ones compile nothing.

Legend: T tokens, E experts, S slots, P (token, expert) pairs, H columns of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_laer.runtime.comm.memory import empty, poison


def send_rows(
    routing_map_TE: torch.Tensor,
    num_sent: int,
    starts_S: torch.Tensor,
    ends_S: torch.Tensor,
    first_row_S: torch.Tensor,
    by_expert_S: torch.Tensor,
    first_E1: torch.Tensor,
    *,
    ends_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the row of every pair in the send buffer; return int32 tensors.

    Args:
        starts_S, ends_S: each slot's range among its expert's tokens.
        first_row_S: the first row of each slot in the send buffer.
        by_expert_S: the slots sorted by expert.
        first_E1: [E + 1], the start of each expert's slots there.
        ends_T: `token_ends`, if it was launched before.

    Returns:
        pair_P, token_P, and ends_T and by_token_P of `RowMap`.
    """
    num_tokens, num_experts = routing_map_TE.shape

    def make(*shape: int) -> torch.Tensor:
        return empty(shape, torch.int32, routing_map_TE.device)

    pair_P, token_P, by_token_P = make(num_sent), make(num_sent), make(num_sent)
    if ends_T is None:
        ends_T = token_ends(routing_map_TE)
    row_TE = make(num_tokens, num_experts)
    if num_tokens:
        _rows_of_expert[(num_experts,)](
            routing_map_TE.contiguous().view(torch.uint8),
            starts_S,
            ends_S,
            first_row_S,
            by_expert_S,
            first_E1,
            pair_P,
            token_P,
            row_TE,
            num_tokens,
            num_experts,
            BLOCK=1024,
        )
        _rows_of_token[(num_tokens,)](
            row_TE, ends_T, by_token_P, num_experts, BLOCK=triton.next_power_of_2(num_experts)
        )
    return pair_P, token_P, ends_T, by_token_P


def token_ends(routing_map_TE: torch.Tensor) -> torch.Tensor:
    """Return the end of each token's pairs, int32 [T], among those of all tokens."""
    return routing_map_TE.sum(dim=1).cumsum(dim=0, dtype=torch.int32)


def sum_rows(rows_PH: torch.Tensor, ends_T: torch.Tensor, by_token_P: torch.Tensor) -> torch.Tensor:
    """Sum the rows of each token in the order of `by_token_P`, in fp32, without copies."""
    num_tokens, width = len(ends_T), rows_PH.shape[1]
    sums_TH = poison(rows_PH.new_empty(num_tokens, width))
    if num_tokens:
        block = min(triton.next_power_of_2(width), 1024)
        grid = (num_tokens, triton.cdiv(width, block))
        _sum_rows[grid](rows_PH.contiguous(), ends_T, by_token_P, sums_TH, width, BLOCK=block)
    return sums_TH


@triton.jit(do_not_specialize=["num_tokens"])
def _rows_of_expert(
    map_TE,
    starts_S,
    ends_S,
    first_row_S,
    by_expert_S,
    first_E1,
    pair_P,
    token_P,
    row_TE,
    num_tokens,
    num_experts,
    BLOCK: tl.constexpr,
):
    """Enumerate an expert's tokens, and store each one's row in its slot, both ways."""
    expert = tl.program_id(0)
    first = tl.load(first_E1 + expert)
    last = tl.load(first_E1 + expert + 1)
    before = 0
    for begin in range(0, num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        inside = token < num_tokens
        chosen = tl.load(map_TE + token * num_experts + expert, mask=inside, other=0).to(tl.int32)
        place = before + tl.cumsum(chosen, 0) - chosen
        row = place
        for replica in range(first, last):
            slot = tl.load(by_expert_S + replica)
            start = tl.load(starts_S + slot)
            serves = (place >= start) & (place < tl.load(ends_S + slot))
            row = tl.where(serves, place - start + tl.load(first_row_S + slot), row)
        routed = chosen != 0
        tl.store(pair_P + row, token * num_experts + expert, mask=routed)
        tl.store(token_P + row, token, mask=routed)
        none = tl.full((BLOCK,), -1, tl.int32)
        tl.store(row_TE + token * num_experts + expert, tl.where(routed, row, none), mask=inside)
        before += tl.sum(chosen, 0)


@triton.jit
def _rows_of_token(row_TE, ends_T, by_token_P, num_experts, BLOCK: tl.constexpr):
    """Write a token's rows in ascending order, which is that of slots."""
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    row = tl.load(row_TE + token * num_experts + expert, mask=expert < num_experts, other=-1)
    count = tl.sum((row >= 0).to(tl.int32), 0)
    begin = tl.load(ends_T + token) - count
    last = -1
    for place in range(count):
        last = tl.min(tl.where(row > last, row, 2147483647), 0)
        tl.store(by_token_P + begin + place, last)


@triton.jit
def _sum_rows(rows_PH, ends_T, by_token_P, sums_TH, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.full((BLOCK,), 0.0, tl.float32)
    begin = tl.load(ends_T + token - 1, mask=token > 0, other=0)
    for place in range(begin, tl.load(ends_T + token)):
        row = tl.load(by_token_P + place).to(tl.int64)
        total += tl.load(rows_PH + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_TH + token * width + column, total.to(sums_TH.dtype.element_ty), mask=inside)
