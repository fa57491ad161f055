"""Both forms of the map from tokens to slots agree; `test_permutation.py` has the other's sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.layer.dispatch.permutation import slot_ranges
from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching
from megatron_laer.layer.dispatch.slots import to_choices, to_slots
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from tests.unit.planner_cases import geometries
from tests.unit.routed import route


@settings(max_examples=100)
@given(geometries(6, 12, 1), st.integers(0, 40), st.booleans(), st.integers(0, 2**20))
def test_a_tokens_choices_are_its_columns_of_the_map_to_slots(
    geometry: Geometry, tokens: int, uneven: bool, seed: int
) -> None:
    layout, topk = ExpertLayout.random(*geometry.shape, (seed,)), 1 + seed % geometry.num_experts
    rank = route(layout, [tokens] * geometry.num_ranks, topk, seed, uneven=uneven)[0]
    map_TE, row_S, num_slots = rank.map_TE, rank.quotas.row_S, layout.num_slots
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(map_TE.shape, generator=generator) * map_TE
    probs = probs.masked_fill(probs > 0.9, 0).requires_grad_()
    slot_expert_S = torch.from_numpy(layout.slot_expert_S.astype(np.int64))
    ranges = torch.from_numpy(slot_ranges(rank.quotas))
    probs_TS, map_TS = to_slots(probs, map_TE, slot_expert_S, ranges)
    by_expert = np.argsort(layout.slot_expert_S, kind="stable")
    order, tokens_S = torch.from_numpy(by_expert), torch.from_numpy(row_S[by_expert])
    probs_TK, slot_TK = to_choices(probs, map_TE, topk, order, tokens_S, int(row_S.sum()))

    assert slot_TK.shape == probs_TK.shape == (tokens, topk) and slot_TK.dtype == torch.int64
    found = torch.zeros(tokens, num_slots + 1)
    places = slot_TK % (num_slots + 1)  # the last column is for no slot
    assert torch.equal(found.scatter(1, places, 1.0)[:, :-1], map_TS.float())
    assert torch.equal(found.scatter(1, places, probs_TK)[:, :-1], probs_TS)
    weight_TS = torch.rand(probs_TS.shape, generator=generator)
    (expected,) = torch.autograd.grad((probs_TS * weight_TS).sum(), probs)
    weight_TK = torch.cat([weight_TS, torch.ones(tokens, 1)], dim=1).gather(1, places)
    (grad,) = torch.autograd.grad((probs_TK * weight_TK).sum(), probs)
    assert torch.equal(grad, expected)


class Alone(SlotDispatching):
    tp_size = 1


def test_a_dispatcher_without_its_layer_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="call the MoE layer, not its dispatcher alone"):
        Alone().token_dispatch(torch.ones(1, 1), torch.ones(1))
