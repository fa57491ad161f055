"""Replicas in fp8 hold the bytes of their home's quantised experts, scales included."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.layer.experts.fp8.payload import PayloadForm
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import EMPTY
from megatron_laer.planner.placed import Placed
from megatron_laer.precision import Precision
from megatron_laer.runtime.comm.exchange import Exchange, ReusableWeights
from megatron_laer.runtime.comm.layout_index import layout_index
from tests.doubles import fp8
from tests.loopback import groups_of, run

# For each number of nodes, by both ways of exchange.
CASES = 50
RANKS, EXPERTS = 4, 12
# Matrices with uneven blocks, and with more than one in both directions.
SIZES = [(16, 48), (48, 16), (144, 32), (32, 272), (160, 160)]


def packers() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return the form of a payload and the quantiser, by name."""

    def form(precision: Precision, **direction: bool) -> Callable[..., Any]:
        return partial(PayloadForm, precision, **direction)

    return {
        "per tensor": (form(Precision.TENSORWISE), fp8.per_tensor),
        "by blocks": (form(Precision.BLOCKWISE), partial(fp8.by_blocks, block=(128, 128))),
        "mx rows": (form(Precision.MXFP8), fp8.mx),
        "mx columns": (form(Precision.MXFP8, by_columns=True), partial(fp8.mx, by_columns=True)),
    }


def check(form: Any, packed: list[Any], geometry: Geometry, seed: int) -> int:
    """Restore and update by both ways; return the number of replicas that were compared."""
    compared, home = 0, geometry.home_slots
    placed = [Placed(geometry.random_layout((seed, step)), geometry) for step in range(2)]
    first, then = (layout_index(one, torch.device("cpu")) for one in placed)
    homes = [packed[rank * home : (rank + 1) * home] for rank in range(geometry.num_ranks)]
    for algorithm in ExchangeAlgorithm:
        way = way_of(geometry, algorithm)
        exchanges = [
            Exchange(group, [way]) for group in groups_of(geometry.num_ranks, geometry.node_size)
        ]
        pairs = list(zip(exchanges, homes, strict=True))
        restored = run([one.restore_steps(own, first, form.payload_rows) for one, own in pairs])
        held = [[matrix.clone() for matrix in restored]]
        reuse = [ReusableWeights(first, matrix) for matrix in restored]
        held.append(
            run(
                [
                    one.restore_steps(own, then, form.payload_rows, reuse=kept)
                    for (one, own), kept in zip(pairs, reuse, strict=True)
                ]
            )
        )
        for of, matrices in zip(placed, held, strict=True):
            for rank, slots in enumerate(matrices):
                for slot, expert in enumerate(of.layout.experts_of(rank)[home:]):
                    if expert != EMPTY:
                        compared += 1
                        assert torch.equal(slots[slot], packed[expert]), (geometry, form)
    return compared


@pytest.mark.parametrize("name", packers())
@pytest.mark.parametrize("node_size", [4, 2])
def test_payloads_of_replicas_are_their_homes_bytes(node_size: int, name: str) -> None:
    form_of, quantise = packers()[name]
    draw, generator = random.Random(name), torch.Generator().manual_seed(1)
    forms = [form_of(*size) for size in SIZES]
    experts_of = []
    for form in forms:
        wholes = torch.randn((EXPERTS, form.rows, form.columns), generator=generator)
        wholes *= 10.0 ** torch.arange(-EXPERTS // 2, EXPERTS // 2).view(-1, 1, 1)
        experts_of.append([form.pack(*quantise(one, dtype=fp8.E4M3)) for one in wholes.bfloat16()])
    compared = 0
    for seed in range(CASES):
        home, at = draw.randint(1, EXPERTS // RANKS), draw.randrange(len(SIZES))
        capacity = min(home + draw.randint(1, 3), home * RANKS)
        geometry = Geometry(RANKS, home * RANKS, capacity, node_size, Sharding.EXPERTS)
        packed = draw.sample(experts_of[at], home * RANKS)
        compared += check(forms[at], packed, geometry, seed)
    assert compared > 5 * CASES
