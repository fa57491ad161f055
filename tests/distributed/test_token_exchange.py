"""Tokens that go through nodes bring experts the same bits, and send what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_laer.testing.ranks import RankPool
from tests.token_exchange import Case, Outcome, gloo_groups, run

EVEN = Case((24, 24, 24, 24), 2)
CASES = {
    "nodes of 1": replace(EVEN, node_size=1),
    "nodes of 2": EVEN,
    "one node": replace(EVEN, node_size=4),
    "tokens on some ranks, top-1": Case((7, 0, 0, 19), 2, top_k=1),
    "empty nodes": Case((9, 5, 11, 1), 2, capacity=8, top_k=1, crowded=True),
    "no tokens": Case((0, 0, 0, 0), 2),
    "a slot per rank": Case((13, 8, 5, 30), 2, capacity=1, experts=4, top_k=3),
    "all experts": Case((16, 3, 4, 8), 2, capacity=6, top_k=8),
}


def both(case: Case, dtype_name: str) -> tuple[Outcome, Outcome, Outcome]:
    """On a rank: by Megatron's rows, and twice through nodes."""
    import torch

    dtype = getattr(torch, dtype_name)
    with gloo_groups(case.node_size) as groups:
        by_rank = run(case, groups, nodes=False, dtype=dtype)
        through_nodes = [run(case, groups, nodes=True, dtype=dtype) for _ in range(2)]
    return by_rank, *through_nodes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_experts_get_the_same_bits_and_sums_differ_by_rounding(
    ranks: Callable[[int], RankPool], case: str, dtype: str
) -> None:
    import torch

    for by_rank, nodes, again in ranks(CASES[case].ranks).run(both, CASES[case], dtype):
        for mine, stocks in zip(nodes.experts, by_rank.experts, strict=True):
            assert torch.equal(mine, stocks)
        # A bf16 rounding per sum: of a rank's pairs, of a node's ranks, and of nodes.
        bound = {} if dtype == "float32" else {"rtol": 5e-2, "atol": 5e-2}
        for mine, stocks in zip(
            (nodes.combined, *nodes.grads), (by_rank.combined, *by_rank.grads), strict=True
        ):
            torch.testing.assert_close(mine, stocks, **bound)
        assert torch.equal(nodes.grads[1], by_rank.grads[1]) or dtype == "bfloat16"
        for mine, repeated in zip(
            (nodes.combined, *nodes.grads), (again.combined, *again.grads), strict=True
        ):
            assert torch.equal(mine, repeated)
