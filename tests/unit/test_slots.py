"""The token → slot map serves every (token, expert) pair once, within the quotas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.layer.dispatch.permutation import slot_ranges
from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching
from megatron_laer.layer.dispatch.slots import to_choices, to_slots
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.quotas import even_split
from megatron_laer.planner.splits import RankQuotas


def routed(tokens: int, experts: int, topk: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random top-k routing: probabilities [T, E], zero where not routed, and the map."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool)
    routing_map.scatter_(1, scores.topk(topk, dim=1).indices, True)
    return scores * routing_map, routing_map


def map_to_slots(
    probs: torch.Tensor, routing_map: torch.Tensor, layout: ExpertLayout, rank: int, node: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return the map of one rank that has all tokens."""
    counts_NE = np.zeros((layout.num_ranks, layout.num_experts), dtype=np.int64)
    counts_NE[rank] = routing_map.sum(0).numpy()
    split = even_split(layout, node)
    row_S = split.rank_row(counts_NE, rank)
    quotas = RankQuotas.of(layout, row_S, split.rank_columns(counts_NE, rank))
    slot_expert_S = torch.from_numpy(layout.slot_expert_S.astype(np.int64))
    ranges = torch.from_numpy(slot_ranges(quotas))
    return (*to_slots(probs, routing_map, slot_expert_S, ranges), row_S)


@settings(max_examples=150)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 12),
    ranks=st.integers(1, 6),
    spare=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_every_pair_gets_exactly_one_slot_of_its_expert(
    tokens: int, experts: int, ranks: int, spare: int, seed: int
) -> None:
    capacity = min(experts, -(-experts // ranks) + spare)
    layout = ExpertLayout.random(ranks, capacity, experts, (seed,))
    topk = 1 + seed % experts
    probs, routing_map = routed(tokens, experts, topk, seed)
    rank = seed % ranks
    probs_TS, map_TS, row_S = map_to_slots(probs, routing_map, layout, rank, 1)

    assert map_TS.sum(0).tolist() == row_S.tolist()
    by_expert = torch.zeros(tokens, experts, dtype=torch.int64)
    slot_expert = torch.from_numpy(layout.slot_expert_S.astype(np.int64))
    by_expert.index_add_(1, slot_expert, map_TS.long())
    assert torch.equal(by_expert, routing_map.long())
    assert torch.equal(probs_TS.sum(1), probs_TS[:, :].masked_fill(~map_TS, 0).sum(1))
    recovered = torch.zeros_like(probs).index_add_(1, slot_expert, probs_TS)
    assert torch.equal(recovered, probs)


@settings(max_examples=100)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 12),
    ranks=st.integers(1, 6),
    uneven=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_tokens_choices_are_its_columns_of_the_map_to_slots(
    tokens: int, experts: int, ranks: int, uneven: bool, seed: int
) -> None:
    capacity = min(experts, -(-experts // ranks) + 1)
    layout = ExpertLayout.random(ranks, capacity, experts, (seed,))
    topk = 1 + seed % experts
    probs, routing_map = routed(tokens, experts, topk, seed)
    if uneven:  # some tokens have fewer experts, or none
        routing_map &= probs > 0.7
    probs = (probs * routing_map).masked_fill(probs > 0.9, 0).requires_grad_()
    probs_TS, map_TS, row_S = map_to_slots(probs, routing_map, layout, 0, 1)
    by_expert = np.argsort(layout.slot_expert_S, kind="stable")
    probs_TK, slot_TK = to_choices(
        probs,
        routing_map,
        topk,
        torch.from_numpy(by_expert),
        torch.from_numpy(row_S[by_expert]),
        int(row_S.sum()),
    )

    assert slot_TK.shape == probs_TK.shape == (tokens, topk) and slot_TK.dtype == torch.int64
    found = torch.zeros(tokens, layout.num_slots + 1)
    places = slot_TK % (layout.num_slots + 1)  # the last column is for no slot
    chosen = found.scatter(1, places, 1.0)[:, :-1]
    assert torch.equal(chosen, map_TS.float())
    assert torch.equal(found.scatter(1, places, probs_TK)[:, :-1], probs_TS)
    weight_TS = torch.rand(probs_TS.shape, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad((probs_TS * weight_TS).sum(), probs)
    weight_TK = torch.cat([weight_TS, torch.ones(tokens, 1)], dim=1).gather(1, places)
    (grad,) = torch.autograd.grad((probs_TK * weight_TK).sum(), probs)
    assert torch.equal(grad, expected)


class Alone(SlotDispatching):
    tp_size = 1


def test_a_dispatcher_without_its_layer_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="call the MoE layer, not its dispatcher alone"):
        Alone().token_dispatch(torch.ones(1, 1), torch.ones(1))
