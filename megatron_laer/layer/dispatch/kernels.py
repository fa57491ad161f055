"""Triton kernels of the token permutations; `permutation` has the torch code of each.

Every result has one writer, or is a count of integers, so bits never depend on timing. Numbers of
tokens and groups are not specialised, so that other ones compile nothing.

Legend: T tokens, E experts, S slots, P (token, expert) pairs, H columns of a row. Choices have B
places, J groups of pairs, K places of a group, W waves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_PAIRS = 512  # of a block


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
        return torch.empty(shape, dtype=torch.int32, device=routing_map_TE.device)

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
    sums_TH = rows_PH.new_empty(num_tokens, width)
    if num_tokens:
        block = min(triton.next_power_of_2(width), 1024)
        grid = (num_tokens, triton.cdiv(width, block))
        _sum_rows[grid](rows_PH.contiguous(), ends_T, by_token_P, sums_TH, width, BLOCK=block)
    return sums_TH


def choose_places(
    token_P: torch.Tensor,
    place_P: torch.Tensor,
    here_TB: torch.Tensor,
    first_J: torch.Tensor,
    place_JK: torch.Tensor,
    tokens_JK: torch.Tensor,
    ends_W: Sequence[int],
    home: int,
) -> None:
    """Choose places of groups of pairs, as the waves of `replica_choice` do, in place.

    Args:
        token_P, place_P: token and place of each pair; those of a group are a run.
        here_TB: int32, pairs of each token at each place; updated.
        first_J: first pair of each group, wave by wave.
        place_JK, tokens_JK: places of each group, and the pairs that each serves.
        ends_W: end of each wave's groups.
    """
    taken_P = torch.empty_like(token_P, dtype=torch.int32)
    width, num_places = place_JK.shape[1], here_TB.shape[1]
    bounds = [0, 0, *ends_W, ends_W[-1]]
    for arriving, leaving, end in zip(bounds, bounds[1:], bounds[2:], strict=False):
        # The wave that has chosen is counted again, and the next one is not while it chooses.
        _recount[(end - arriving,)](
            *(token_P, place_P, here_TB, first_J, tokens_JK, arriving, leaving),
            *(width, num_places),
            BLOCK=_PAIRS,
        )
        if end > leaving:
            _choose[(end - leaving,)](
                *(token_P, place_P, taken_P, here_TB, first_J, place_JK, tokens_JK, leaving),
                *(width, num_places, home),
                BLOCK=_PAIRS,
            )


@triton.jit
def _pairs_of(tokens_JK, group, width):
    size = tl.zeros((), tl.int64)
    for at in range(width):
        size += tl.load(tokens_JK + group * width + at)
    return size


# Numbers of groups and places differ by microbatch, and with them the alignment in an upload.
@triton.jit(
    do_not_specialize=["arriving", "leaving", "width", "num_places"],
    do_not_specialize_on_alignment=["first_J", "tokens_JK"],
)
def _recount(
    token_P,
    place_P,
    here_TB,
    first_J,
    tokens_JK,
    arriving,
    leaving,
    width,
    num_places,
    BLOCK: tl.constexpr,
):
    """Add the pairs of a group to the counts of their places, or subtract those of a later one."""
    group = arriving + tl.program_id(0)
    change = tl.where(group < leaving, 1, -1).to(tl.int32)
    first, size = tl.load(first_J + group), _pairs_of(tokens_JK, group, width)
    for begin in range(0, size, BLOCK):
        number = begin + tl.arange(0, BLOCK)
        inside = number < size
        token = tl.load(token_P + first + number, mask=inside, other=0)
        place = tl.load(place_P + first + number, mask=inside, other=0)
        tl.atomic_add(here_TB + token * num_places + place, change, mask=inside)


@triton.jit
def _goes(here_TB, token, place, tokens, home, num_places, inside):
    """Return whether tokens go to a place that serves some, without this group's pairs."""
    count = tl.load(here_TB + token * num_places + place, mask=inside, other=0)
    return ((count > 0) | (place == home)) & (tokens > 0)


@triton.jit(
    do_not_specialize=["leaving", "width", "num_places", "home"],
    do_not_specialize_on_alignment=["first_J", "place_JK", "tokens_JK"],
)
def _choose(
    token_P,
    place_P,
    taken_P,
    here_TB,
    first_J,
    place_JK,
    tokens_JK,
    leaving,
    width,
    num_places,
    home,
    BLOCK: tl.constexpr,
):
    """Assign each place of a group its number of pairs, by preference and then in order."""
    group = leaving + tl.program_id(0)
    first, size = tl.load(first_J + group), _pairs_of(tokens_JK, group, width)
    places, served = place_JK + group * width, tokens_JK + group * width
    for begin in range(0, size, BLOCK):
        number = begin + tl.arange(0, BLOCK)
        last = tl.zeros((BLOCK,), tl.int32) + width - 1
        tl.store(taken_P + first + number, last, mask=number < size)
    tl.debug_barrier()
    for choice in range(width - 1):
        wanted = tl.load(served + choice)
        chosen = tl.load(places + choice)
        before = tl.zeros((), tl.int64)
        for preference in range(3):
            for begin in range(0, size, BLOCK):
                number = begin + tl.arange(0, BLOCK)
                inside = number < size
                token = tl.load(token_P + first + number, mask=inside, other=0)
                goes = _goes(here_TB, token, chosen, wanted, home, num_places, inside)
                elsewhere = goes & False
                for other in range(choice + 1, width):
                    elsewhere = elsewhere | _goes(
                        here_TB,
                        token,
                        tl.load(places + other),
                        tl.load(served + other),
                        home,
                        num_places,
                        inside,
                    )
                taken = tl.load(taken_P + first + number, mask=inside, other=0)
                likes = elsewhere.to(tl.int32) - goes.to(tl.int32) + 1 == preference
                # Those that a wave of this loop took have this choice, which is no less.
                likes = (likes & inside & (taken == width - 1)).to(tl.int32)
                rank = before + tl.cumsum(likes, 0) - likes
                takes = (likes != 0) & (rank < wanted)
                tl.store(taken_P + first + number, choice, mask=takes)
                before += tl.sum(likes, 0)
        tl.debug_barrier()
    for begin in range(0, size, BLOCK):
        number = begin + tl.arange(0, BLOCK)
        inside = number < size
        taken = tl.load(taken_P + first + number, mask=inside, other=0)
        tl.store(place_P + first + number, tl.load(places + taken, mask=inside), mask=inside)


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
