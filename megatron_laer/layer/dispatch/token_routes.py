"""Rows that a rank sends in each stage of a token exchange, by its pairs' slots.

A row is a token's hidden state on its way to a rank, or to a node. The order is the same in every
stage: by destination, then in the previous order, which at the source is that of tokens. All work
is on the device, without waiting for it: sizes are exchanged separately.

Legend: N ranks, C slots per rank, G ranks per node, M = N/G nodes, B = ⌈G/8⌉ bytes of bits. T
tokens, E experts, P pairs that are sent, R pairs that are received. Y rows, X rows sent of them; Z
= N + M, or N for an exchange in one stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_laer.layer.dispatch.permutation import rows_of_runs, run_sizes, true_places
from megatron_laer.layer.dispatch.row_map import RowMap, row_map
from megatron_laer.planner.splits import RankQuotas
from megatron_laer.planner.token_rows import TokenRows
from megatron_laer.runtime.comm.copies import upload


@dataclass(frozen=True, eq=False)
class PairRoutes:
    """Routes of a rank's pairs, before other ranks' sizes are known.

    Attributes:
        pair_P: position of each pair in the router's map [T, E], by slot, then token.
        row_P: number of each pair's row among those for the pair's rank, int32.
        reaches_NT: whether a token goes to a rank.
        node_size: G; N for an exchange in one stage.
    """

    pair_P: torch.Tensor
    row_P: torch.Tensor
    reaches_NT: torch.Tensor
    node_size: int

    @property
    def sizes_Z(self) -> torch.Tensor:
        """Return the numbers of rows for each rank, and then for each node, int32."""
        rows_N = self.reaches_NT.sum(1, dtype=torch.int32)
        if self.node_size == len(rows_N):
            return rows_N
        rows_M = self._reaches_MGT.any(1).sum(1, dtype=torch.int32)
        return torch.cat([rows_N, rows_M])

    def first_stage(self, num_rows: int) -> tuple[RowMap, torch.Tensor | None]:
        """Return the map of tokens to the `num_rows` rows that are sent first.

        With it come bits, uint8 [X, B], of the local ranks to forward to; None for one stage.
        """
        num_tokens = self.reaches_NT.shape[1]
        if self.node_size == len(self.reaches_NT):
            token_X, _ = _true_places(self.reaches_NT, num_rows)
            return row_map(token_X, num_tokens), None
        token_X, node_X = _true_places(self._reaches_MGT.any(1), num_rows)
        local_ranks_XG = self._reaches_MGT.transpose(1, 2)[node_X, token_X]
        return row_map(token_X, num_tokens), _to_bits(local_ranks_XG)

    @property
    def _reaches_MGT(self) -> torch.Tensor:
        num_ranks, num_tokens = self.reaches_NT.shape
        return self.reaches_NT.view(num_ranks // self.node_size, self.node_size, num_tokens)


def token_order(routing_map_TE: torch.Tensor, quotas: RankQuotas) -> torch.Tensor:
    """Assign consecutive runs of an expert's tokens to its replicas, in slot order.

    Returns:
        The slot of each pair, by expert, then token: slot_P.
    """
    sizes = run_sizes(quotas.row_S.size, routing_map_TE.shape[1])
    by_expert_S = quotas.runs[sum(sizes[:3]) : sum(sizes[:4])]
    tokens_S = quotas.row_S[by_expert_S].astype(by_expert_S.dtype)
    packed = torch.from_numpy(np.concatenate([by_expert_S, tokens_S]))
    slots, tokens = upload(packed, routing_map_TE.device).chunk(2)
    return torch.repeat_interleave(slots, tokens, output_size=quotas.num_sent)


def pair_routes(
    routing_map_TE: torch.Tensor,
    slot_P: torch.Tensor,
    num_ranks: int,
    capacity: int,
    node_size: int,
) -> PairRoutes:
    """Find the rows of a rank's pairs, with slots as in `token_order`."""
    num_tokens, num_experts = routing_map_TE.shape
    token_P, expert_P = _true_places(routing_map_TE.t(), len(slot_P))
    by_slot_P = torch.sort(slot_P, stable=True).indices
    token_P, expert_P = token_P[by_slot_P].long(), expert_P[by_slot_P].long()
    rank_P = slot_P[by_slot_P].long() // capacity

    reaches_NT = torch.zeros(num_ranks, num_tokens, dtype=torch.bool, device=slot_P.device)
    place_P = rank_P * num_tokens + token_P
    reaches_NT.view(-1).index_fill_(0, place_P, True)
    row_NT = reaches_NT.cumsum(1, dtype=torch.int32) - 1
    return PairRoutes(
        token_P * num_experts + expert_P,
        row_NT.view(-1).index_select(0, place_P),
        reaches_NT,
        num_ranks if node_size == 1 else node_size,
    )


def second_stage(bits_YB: torch.Tensor, node_size: int, num_rows: int) -> RowMap:
    """Find the `num_rows` rows that a rank forwards in its node, by the bits of local ranks."""
    passed_on_GY = _from_bits(bits_YB, node_size).t()
    row_X, _ = _true_places(passed_on_GY, num_rows)
    return row_map(row_X, len(bits_YB))


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Rows and order of the pairs that a rank received.

    Attributes:
        rows: the map of rows that arrived to pairs, by slot, then source rank.
        arrived_R: position, among arrivals, of each pair in that order; `sorted_R` is the inverse.
    """

    rows: RowMap
    arrived_R: torch.Tensor
    sorted_R: torch.Tensor


def arrivals(row_R: torch.Tensor, quotas: RankQuotas, rows: TokenRows) -> Arrivals:
    """Find the rows of the pairs that a rank received, by source rank, then slot.

    Args:
        row_R: number of each pair's row among those from the pair's source.
    """
    num_ranks, num_slots = len(quotas.columns_NC), quotas.row_S.size
    *_, shifts_size, counts_size, _, _ = sizes = run_sizes(num_slots, 0)
    of_arrivals = slice(-sum(sizes[5:]), -sum(sizes[7:]))
    runs = quotas.runs[of_arrivals]
    sources_2N = np.stack([rows.starts_N, quotas.output_splits_N]).astype(runs.dtype)
    packed = upload(torch.from_numpy(np.concatenate([runs, sources_2N.ravel()])), row_R.device)
    shifts, counts, starts_N, pairs_N = packed.split(
        [shifts_size, counts_size, num_ranks, num_ranks]
    )
    received = quotas.num_received
    arrived_R, sorted_R = rows_of_runs(shifts, counts, 2 * received).split([received] * 2)
    row_R = row_R + torch.repeat_interleave(starts_N, pairs_N, output_size=received)
    map_ = row_map(row_R.index_select(0, arrived_R), rows.arrived)
    return Arrivals(map_, arrived_R, sorted_R)


def _true_places(flags_AB: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns, int32, and the rows of the `count` true flags."""
    width = max(flags_AB.shape[1], 1)
    places = true_places(flags_AB, count)
    return (places % width).int(), places // width


def _to_bits(flags_XG: torch.Tensor) -> torch.Tensor:
    padding = -flags_XG.shape[1] % 8
    padded_XB: torch.Tensor = torch.nn.functional.pad(flags_XG.to(torch.uint8), (0, padding))
    bits_XB8: torch.Tensor = padded_XB.unflatten(1, (-1, 8)) << _bits(flags_XG.device)
    return bits_XB8.sum(2, dtype=torch.uint8)


def _from_bits(bits_YB: torch.Tensor, width: int) -> torch.Tensor:
    flags_YB8: torch.Tensor = (bits_YB.unsqueeze(2) >> _bits(bits_YB.device)) & 1
    return flags_YB8.flatten(1)[:, :width].bool()


def _bits(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
