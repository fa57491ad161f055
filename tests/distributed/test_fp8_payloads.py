"""Replicas in fp8 hold the bytes of their home's quantised experts, scales included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from tests.distributed.test_home_exchange import exchanges_on
from tests.placed import placed

# For each number of nodes, by both ways of exchange.
CASES = 200
EXPERTS = 12
# Matrices with uneven blocks, and with more than one in both directions.
SIZES = [(16, 48), (48, 16), (144, 32), (32, 272), (160, 160)]


def packers() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return the form of a payload and the quantiser, by name."""
    from megatron_laer.choices import Fp8Recipe
    from megatron_laer.layer.experts.fp8.payload import PayloadForm
    from tests.doubles import fp8

    def form(recipe: Fp8Recipe, **direction: bool) -> Callable[..., Any]:
        return partial(PayloadForm, recipe, **direction)

    return {
        "per tensor": (form(Fp8Recipe.TENSORWISE), fp8.per_tensor),
        "by blocks": (form(Fp8Recipe.BLOCKWISE), partial(fp8.by_blocks, block=(128, 128))),
        "mx rows": (form(Fp8Recipe.MXFP8), fp8.mx),
        "mx columns": (form(Fp8Recipe.MXFP8, by_columns=True), partial(fp8.mx, by_columns=True)),
    }


def every_case(node_size: int, name: str) -> tuple[int, int]:
    """Return the numbers of cases with replicas, and of replicas that were compared."""
    import random

    import torch
    import torch.distributed as dist

    from megatron_laer.runtime.comm.exchange import ReusableWeights
    from megatron_laer.runtime.comm.layout_index import layout_index
    from tests.doubles import fp8

    form_of, quantise = packers()[name]
    draw, generator = random.Random(name), torch.Generator().manual_seed(1)
    forms = [form_of(*size) for size in SIZES]
    experts_of = []
    for form in forms:
        wholes = torch.randn((EXPERTS, form.rows, form.columns), generator=generator)
        wholes *= 10.0 ** torch.arange(-EXPERTS // 2, EXPERTS // 2).view(-1, 1, 1)
        experts_of.append([form.pack(*quantise(one, dtype=fp8.E4M3)) for one in wholes.bfloat16()])
    tried = cases = compared = 0

    with exchanges_on(node_size) as exchanges:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        while cases < CASES:
            home, at = draw.randint(1, EXPERTS // ranks), draw.randrange(len(SIZES))
            shape = ranks, min(home + draw.randint(1, 3), home * ranks), home * ranks
            layouts = [ExpertLayout.random_at_home(*shape, seed=(tried, i)) for i in range(2)]
            first, then = (
                layout_index(placed(one, at_home=True), torch.device("cpu")) for one in layouts
            )
            packed, rows = draw.sample(experts_of[at], home * ranks), forms[at].payload_rows
            homes = packed[rank * home : (rank + 1) * home]
            tried += 1
            cases += first.placed.has_replicas or then.placed.has_replicas
            for way in ("direct", "relay, node"):
                restored = exchanges[way].restore(homes, first, rows)
                held = [restored.clone()]
                reuse = ReusableWeights(first, restored)
                held.append(exchanges[way].restore(homes, then, rows, reuse=reuse))
                for layout, held_CPK in zip(layouts, held, strict=True):
                    for slot, expert in enumerate(layout.experts_of(rank)[home:]):
                        if expert != EMPTY:
                            compared += 1
                            assert torch.equal(held_CPK[slot], packed[expert]), (shape, SIZES[at])
    return cases, compared


@pytest.mark.parametrize(
    "name",
    ["per tensor", "by blocks", "mx columns", pytest.param("mx rows", marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize("node_size", [4, 2])
def test_payloads_of_replicas_are_their_homes_bytes(
    ranks: RankPools, node_size: int, name: str
) -> None:
    found = ranks(4).run(every_case, node_size, name)
    assert all(cases >= CASES for cases, _ in found)
    assert sum(compared for _, compared in found) > 500
