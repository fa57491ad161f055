"""Triton kernels of the permutations equal torch, in Triton's interpreter or on a card.

`TRITON_INTERPRET=1 python -m tests.dispatch_kernels` checks them on the CPU. Triton reads this at
import, so tests start a process.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch

from megatron_laer.choices import Split
from megatron_laer.layer.dispatch import kernels, row_map
from megatron_laer.layer.dispatch.permutation import run_sizes, send_rows
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from tests.exchange_kernels import INTERPRETED

CPU = torch.device("cpu")
# Ranks, slots per rank, experts, tokens, experts per token.
SIZES = [
    (1, 1, 1, 3, 1),
    (2, 3, 4, 0, 2),
    (2, 4, 4, 1, 4),
    (2, 3, 4, 1025, 1),
    (3, 5, 12, 130, 8),
    (8, 512, 1024, 40, 8),
]
SUMS = [(1, 0, 8), (5, 5, 7), (33, 99, 64), (9, 72, 1500)]


def check_send_rows(
    ranks: int, capacity: int, experts: int, tokens: int, topk: int, device: torch.device
) -> None:
    layout = ExpertLayout.random(ranks, capacity, experts, (tokens,))
    generator = torch.Generator().manual_seed(tokens)
    scores_TE = torch.rand(tokens, experts, generator=generator)
    scores_TE[:, -1] += 1  # one expert has all tokens
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    map_TE.scatter_(1, scores_TE.topk(topk, dim=1).indices, True)
    map_TE[::3, ::2] = False  # a token may have fewer experts than others
    counts_NE = np.tile(map_TE.sum(0).numpy(), (ranks, 1))
    quotas = solve_quotas(Split.EXACT, counts_NE, layout, 1)
    rank = ranks - 1
    mine = RankQuotas.of(layout, quotas.rank_row(rank), quotas.rank_columns(rank))
    parts = torch.from_numpy(mine.runs).split(run_sizes(layout.num_slots, experts))
    pair_P, token_P = send_rows(map_TE, mine.num_sent, *parts[7:])
    given = [part.to(device) for part in parts[:5]]
    found = kernels.send_rows(map_TE.to(device), mine.num_sent, *given)
    expected = pair_P, token_P, map_TE.sum(1).cumsum(0), token_P.argsort(stable=True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.int32
        assert torch.equal(one.cpu().long(), other)


def check_sum_rows(
    tokens: int, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows_PH = torch.randn(rows, width, generator=generator).to(dtype)
    token_P = torch.randint(0, tokens, (rows,), generator=generator)
    ends_T = torch.bincount(token_P, minlength=tokens).cumsum(0).int()
    by_token_P = token_P.argsort(stable=True).int()
    found = kernels.sum_rows(rows_PH.to(device), ends_T.to(device), by_token_P.to(device))
    expected = row_map.sum_copies(rows_PH, tokens, token_P)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), expected)


def check_row_map(
    rows: int, copies: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare collecting by a kernel's map with torch's: in float32, rounded once."""
    generator = torch.Generator().manual_seed(2)
    copies_XH = torch.randn(copies, width, generator=generator).to(dtype)
    row_X = torch.randint(0, rows, (copies,), generator=generator, dtype=torch.int32)
    with mock.patch.object(row_map, "dispatch_kernels", lambda _: kernels):
        found = row_map.row_map(row_X.to(device), rows).collect(copies_XH.to(device))
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), row_map.RowMap(row_X, rows).collect(copies_XH))


def check_all(device: torch.device) -> int:
    for sizes in SIZES:
        check_send_rows(*sizes, device)
    # The interpreter truncates float32 to bfloat16 where a card rounds.
    narrow = torch.float16 if INTERPRETED else torch.bfloat16
    for dtype in (torch.float32, narrow):
        for shape in SUMS:
            check_sum_rows(*shape, dtype, device)
            check_row_map(*shape, dtype, device)
    return len(SIZES) + 4 * len(SUMS)


if __name__ == "__main__":
    print(f"{check_all(CPU)} cases")
