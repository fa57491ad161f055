"""Triton kernels of the token permutations, for CUDA; `permutation` has the torch of each.

Every result has one writer, so nothing is atomic and bits never depend on timing.

Legend: T tokens, E experts, S slots, K experts of a token, P = T·K pairs, H columns of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def send_rows(
    routing_map_TE: torch.Tensor,
    starts_S: torch.Tensor,
    ends_S: torch.Tensor,
    first_row_S: torch.Tensor,
    by_expert_S: torch.Tensor,
    first_E1: torch.Tensor,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the row of every pair in the send buffer, in two launches.

    Args:
        routing_map_TE: bool, the router's.
        starts_S, ends_S: int32, the places among its expert's tokens that each slot serves.
        first_row_S: int32, the first row of each slot in the send buffer.
        by_expert_S: int32, the slots in the order of their experts.
        first_E1: int32 [E + 1], where each expert's slots begin there.
        topk: K.

    Returns:
        int32: of each row its pair in the map [E, T], [P], and its token, [P]; of each token its
        rows, rising, [T, K].
    """
    num_tokens, num_experts = routing_map_TE.shape

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=routing_map_TE.device)

    pair_P, token_P = make(num_tokens * topk), make(num_tokens * topk)
    rows_TK, row_TE = make(num_tokens, topk), make(num_tokens, num_experts)
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
            row_TE, rows_TK, num_experts, topk, BLOCK=triton.next_power_of_2(num_experts)
        )
    return pair_P, token_P, rows_TK


def sum_rows(rows_PH: torch.Tensor, rows_TK: torch.Tensor) -> torch.Tensor:
    """Sum K rows for each token in the order of `rows_TK`, in fp32, with no copy of the rows."""
    num_tokens, topk = rows_TK.shape
    width = rows_PH.shape[1]
    sums_TH = rows_PH.new_empty(num_tokens, width)
    if sums_TH.numel():
        block = min(triton.next_power_of_2(width), 1024)
        grid = (num_tokens, triton.cdiv(width, block))
        _sum_rows[grid](rows_PH.contiguous(), rows_TK, sums_TH, width, topk, BLOCK=block)
    return sums_TH


@triton.jit
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
    """Number an expert's tokens, give each number its slot's row, and note the row both ways."""
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
        tl.store(pair_P + row, expert * num_tokens + token, mask=routed)
        tl.store(token_P + row, token, mask=routed)
        none = tl.full((BLOCK,), -1, tl.int32)
        tl.store(row_TE + token * num_experts + expert, tl.where(routed, row, none), mask=inside)
        before += tl.sum(chosen, 0)


@triton.jit
def _rows_of_token(row_TE, rows_TK, num_experts, topk, BLOCK: tl.constexpr):
    """Write a token's rows in rising order, which is that of slots."""
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    row = tl.load(row_TE + token * num_experts + expert, mask=expert < num_experts, other=-1)
    last = -1
    for place in range(topk):
        last = tl.min(tl.where(row > last, row, 2147483647), 0)
        tl.store(rows_TK + token * topk + place, last)


@triton.jit
def _sum_rows(rows_PH, rows_TK, sums_TH, width, topk, BLOCK: tl.constexpr):
    """Add a token's rows one after the other; a program has up to `BLOCK` of its columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for place in range(topk):
        row = tl.load(rows_TK + token * topk + place).to(tl.int64)
        total += tl.load(rows_PH + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_TH + token * width + column, total.to(sums_TH.dtype.element_ty), mask=inside)
