"""Choice of a slot for each (token, expert) pair, within the slots' quotas.

It moves no token. `token_order` is the plain choice; `choose_replicas` keeps a token's experts
together, first in one node, then on one rank. So fewer rows travel (`planner/token_traffic.py`).

Legend: T tokens, E experts, S slots, P (token, expert) pairs, B places (nodes or ranks). Q pairs of
a wave in J groups, K places of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.layer.dispatch.permutation import run_sizes, true_places
from megatron_laer.layer.dispatch.row_map import dispatch_kernels
from megatron_laer.planner.splits import RankQuotas
from megatron_laer.runtime.comm.copies import upload, upload_arrays

# Minimum share of pairs with a choice: below it, the choice takes longer than the rows it saves. No
# more rows can be saved than pairs choose; exact quotas leave a choice to some 2 %.
_LEAST_SHARE = 0.05
# Experts of one wave choose at once, without each other's choices. This number of waves keeps the
# work on the device independent of the number of experts.
_WAVES = 8


def token_order(routing_map_TE: torch.Tensor, quotas: RankQuotas, node_size: int) -> torch.Tensor:
    """Assign consecutive runs of an expert's tokens to its replicas, in slot order, as slot_P."""
    sizes = run_sizes(quotas.row_S.size, routing_map_TE.shape[1])
    by_expert_S = quotas.runs[sum(sizes[:3]) : sum(sizes[:4])]
    tokens_S = quotas.row_S[by_expert_S].astype(by_expert_S.dtype)
    packed = torch.from_numpy(np.concatenate([by_expert_S, tokens_S]))
    slots, tokens = upload(packed, routing_map_TE.device).chunk(2)
    return torch.repeat_interleave(slots, tokens, output_size=quotas.num_sent)


def choose_replicas(
    routing_map_TE: torch.Tensor, quotas: RankQuotas, node_size: int, rank: int
) -> torch.Tensor:
    """Assign tokens to replicas near the tokens' other experts; return each pair's slot, slot_P.

    Pairs are ordered by expert, then token. Every slot serves as many tokens as in `token_order`.
    Experts choose one after the other, in a few waves. An expert's tokens prefer a node that they
    go to anyway, and in it such a rank. Token order is kept if the choice would send more rows, or
    hardly any pair has one.

    Deterministic: sorts are stable, and sums are of integers. The host does not wait for the
    device.
    """
    plain_P = token_order(routing_map_TE, quotas, node_size)
    if not quotas.num_sent:
        return plain_P
    capacity = quotas.columns_NC.shape[1]
    shares = _Shares.of(quotas, routing_map_TE.shape[1])
    levels = [
        _Level.of(shares, shares.expert_X, node_size * capacity, rank // node_size),
        _Level.of(
            shares,
            shares.expert_X * quotas.row_S.size + shares.slot_X // (node_size * capacity),
            capacity,
            rank,
        ),
    ]
    if not any(level.choices for level in levels):
        return plain_P

    num_tokens = len(routing_map_TE)
    token_P = true_places(routing_map_TE.t(), quotas.num_sent) % num_tokens
    # In every order below, the pairs of a group are a run, with the slots of token order.
    order_P = torch.arange(quotas.num_sent, device=token_P.device)
    for level in levels:
        if level.choices:
            by_place_P = level.sort(token_P[order_P], plain_P, num_tokens)
            order_P = order_P[by_place_P]
    chosen_P = torch.empty_like(plain_P)
    chosen_P[order_P] = plain_P

    is_fewer = _rows(levels, token_P, chosen_P, num_tokens) < _rows(
        levels, token_P, plain_P, num_tokens
    )
    return torch.where(is_fewer, chosen_P, plain_P)


@dataclass(frozen=True, eq=False)
class _Shares:
    """The X slots that serve tokens of this rank, by expert, and their numbers of tokens."""

    slot_X: Int64
    expert_X: Int64
    tokens_X: Int64

    @classmethod
    def of(cls, quotas: RankQuotas, num_experts: int) -> _Shares:
        sizes = run_sizes(quotas.row_S.size, num_experts)
        slot_S = quotas.runs[sum(sizes[:3]) : sum(sizes[:4])].astype(np.int64)
        first_E1 = quotas.runs[sum(sizes[:4]) : sum(sizes[:5])]
        # Empty slots are first.
        expert_S = np.repeat(np.arange(-1, num_experts), np.diff(first_E1, prepend=0))
        tokens_S = quotas.row_S[slot_S]
        used = tokens_S > 0
        return cls(slot_S[used], expert_S[used], tokens_S[used])


@dataclass(frozen=True)
class _Choice:
    """Two or more places of a group of pairs, the tokens of each, and the group's first pair."""

    first: int
    places: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Level:
    """Choice among nodes, or among ranks inside a node; `home` is this rank's place.

    Attributes:
        choices: of the groups that have one; empty if they have too few pairs.
        group_sizes: the pairs of all groups.
    """

    slots_per_place: int
    num_places: int
    home: int
    choices: tuple[_Choice, ...]
    group_sizes: Int64

    @classmethod
    def of(cls, shares: _Shares, group_X: Int64, slots_per_place: int, home: int) -> _Level:
        """Find the groups with several places; equal `group_X` are neighbours."""
        place_X = shares.slot_X // slots_per_place
        begins = np.flatnonzero(np.append(True, np.diff(group_X) != 0))
        ends = np.append(begins[1:], len(group_X))
        sizes = np.add.reduceat(shares.tokens_X, begins)
        firsts = np.cumsum(sizes) - sizes
        choices = []
        is_split = place_X[begins] != place_X[ends - 1]  # places of a group ascend
        for group in np.flatnonzero(is_split).tolist():
            mine = slice(begins[group], ends[group])
            places, at = np.unique(place_X[mine], return_inverse=True)
            tokens = np.zeros(len(places), dtype=np.int64)
            np.add.at(tokens, at, shares.tokens_X[mine])
            choices.append(
                _Choice(int(firsts[group]), tuple(places.tolist()), tuple(tokens.tolist()))
            )
        if sum(sum(choice.tokens) for choice in choices) < _LEAST_SHARE * sizes.sum():
            choices = []
        num_places = max(int(place_X.max()), home) + 1
        return cls(slots_per_place, num_places, home, tuple(choices), sizes)

    def sort(self, token_P: torch.Tensor, slot_P: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Choose a place for each pair, and return the order of pairs by group, then place.

        Args:
            token_P, slot_P: of pairs by group; slots in token order.
        """
        place_P = slot_P.long() // self.slots_per_place
        here_TB = _pairs_at(token_P, place_P, num_tokens, self.num_places)
        # A second round saves less than 0.2 % of rows.
        waves = [self.choices[first::_WAVES] for first in range(min(_WAVES, len(self.choices)))]
        kernels = dispatch_kernels(token_P)
        if kernels is None:
            for choices in waves:
                _Wave.of(choices, token_P.device).choose(token_P, place_P, here_TB, self)
        else:
            ordered = tuple(chain.from_iterable(waves))
            first_J = np.array([choice.first for choice in ordered])
            of_groups = _uploaded(first_J, *_padded(ordered), device=token_P.device)
            kernels.choose_places(
                *(token_P, place_P, here_TB.view(num_tokens, -1), *of_groups),
                [*accumulate(map(len, waves))],
                self.home,
            )
        sizes = upload(torch.from_numpy(self.group_sizes), token_P.device)
        groups = torch.arange(len(sizes), device=token_P.device)
        group_P = torch.repeat_interleave(groups, sizes, output_size=len(token_P))
        return torch.sort(group_P * self.num_places + place_P, stable=True).indices

    def rows(self, token_P: torch.Tensor, slot_P: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Count the rows that leave `home`: distinct pairs of a token and another place."""
        place_P = slot_P.long() // self.slots_per_place
        here_TB = _pairs_at(token_P, place_P, num_tokens, self.num_places).view(num_tokens, -1)
        here_TB[:, self.home] = 0
        return here_TB.count_nonzero()


@dataclass(frozen=True, eq=False)
class _Wave:
    """Groups of pairs that choose at once.

    Attributes:
        pair_Q, group_Q: number and group of each pair, by group.
        first_J: first of these pairs of each group.
        place_JK: places of each group, padded with places 0 that serve no token.
        tokens_JK: number of the group's pairs that each place serves.
    """

    pair_Q: torch.Tensor
    group_Q: torch.Tensor
    first_J: torch.Tensor
    place_JK: torch.Tensor
    tokens_JK: torch.Tensor

    @classmethod
    def of(cls, choices: tuple[_Choice, ...], device: torch.device) -> _Wave:
        place_JK, tokens_JK = _padded(choices)
        size_J = tokens_JK.sum(axis=1)
        first_J = np.cumsum(size_J) - size_J
        shift_J = np.array([choice.first for choice in choices]) - first_J
        firsts, shifts, sizes, places, tokens = _uploaded(
            first_J, shift_J, size_J, place_JK, tokens_JK, device=device
        )
        total = int(size_J.sum())
        groups = torch.arange(len(choices), device=device)
        group_Q = torch.repeat_interleave(groups, sizes, output_size=total)
        pair_Q = torch.arange(total, device=device) + shifts[group_Q]
        return cls(pair_Q, group_Q, firsts, places, tokens)

    def choose(
        self, token_P: torch.Tensor, place_P: torch.Tensor, here_TB: torch.Tensor, level: _Level
    ) -> None:
        """Choose new places for these groups' pairs, and update the counts of pairs, `here_TB`.

        Each place first selects tokens that go there anyway and to none of the remaining places. It
        last selects those that go to a remaining place only. With two places no other choice of one
        group alone has fewer rows.
        """
        row_Q = token_P[self.pair_Q] * level.num_places
        one_Q = torch.ones_like(row_Q, dtype=here_TB.dtype)
        here_TB.index_add_(0, row_Q + place_P[self.pair_Q], -one_Q)
        place_QK = self.place_JK[self.group_Q]
        goes_QK = (here_TB[row_Q.unsqueeze(1) + place_QK] > 0) | (place_QK == level.home)
        goes_QK &= (self.tokens_JK > 0)[self.group_Q]

        size, width = len(row_Q), self.place_JK.shape[1]
        number_Q = torch.arange(size, device=row_Q.device)
        place_in_group_Q = number_Q - self.first_J[self.group_Q]
        taken_Q = torch.full_like(row_Q, width - 1)
        for choice in range(width - 1):
            preference_Q = goes_QK[:, choice + 1 :].any(1).long() - goes_QK[:, choice].long() + 1
            preference_Q = preference_Q.masked_fill(taken_Q < choice, 3)  # already placed
            by_preference_Q = torch.sort(self.group_Q * 4 + preference_Q, stable=True).indices
            # Groups stay runs, so the place in a group is the same before and after the sort.
            takes_Q = place_in_group_Q < self.tokens_JK[self.group_Q, choice]
            is_taken_Q = torch.empty_like(takes_Q)
            is_taken_Q[by_preference_Q] = takes_Q
            taken_Q = taken_Q.masked_fill(is_taken_Q, choice)
        place_Q = place_QK.gather(1, taken_Q.unsqueeze(1)).squeeze(1)
        place_P[self.pair_Q] = place_Q
        here_TB.index_add_(0, row_Q + place_Q, one_Q)


def _padded(choices: Sequence[_Choice]) -> tuple[Int64, Int64]:
    """Return place_JK and tokens_JK of these groups, padded with places 0 that serve no token."""
    width = max(len(choice.places) for choice in choices)
    place_JK, tokens_JK = np.zeros((2, len(choices), width), dtype=np.int64)
    for group, choice in enumerate(choices):
        place_JK[group, : len(choice.places)] = choice.places
        tokens_JK[group, : len(choice.places)] = choice.tokens
    return place_JK, tokens_JK


def _uploaded(*arrays: Int64, device: torch.device) -> list[torch.Tensor]:
    flat = upload_arrays([array.ravel() for array in arrays], device)
    return [part.view(array.shape) for part, array in zip(flat, arrays, strict=True)]


def _pairs_at(
    token_P: torch.Tensor, place_P: torch.Tensor, num_tokens: int, num_places: int
) -> torch.Tensor:
    counts_TB = token_P.new_zeros(num_tokens * num_places, dtype=torch.int32)
    one_P = torch.ones_like(token_P, dtype=torch.int32)
    return counts_TB.index_add_(0, token_P * num_places + place_P, one_P)


def _rows(
    levels: list[_Level], token_P: torch.Tensor, slot_P: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """Count rows, with more weight on one between nodes than on all inside of them."""
    nodes, ranks = (level.rows(token_P, slot_P, num_tokens) for level in levels)
    return nodes * (len(slot_P) + 1) + ranks
