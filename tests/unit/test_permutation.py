"""Permutations equal Megatron's over the token → slot map, bit for bit, whose forms agree."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs, unpermute

from megatron_laer.layer.dispatch import row_map as row_map_module
from megatron_laer.layer.dispatch.node_dispatcher import NodeTokenDispatcher
from megatron_laer.layer.dispatch.permutation import (
    slot_permutation,
    slot_ranges,
    true_places,
)
from megatron_laer.layer.dispatch.row_map import row_map, sum_copies
from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching
from megatron_laer.layer.dispatch.slots import to_choices, to_slots
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from tests.unit.planner_cases import geometries
from tests.unit.routed import Rank, exchange, route

Tensors = tuple[torch.Tensor, ...]
HIDDEN = 5


@dataclass(frozen=True)
class Steps:
    to_send: Callable[[torch.Tensor, torch.Tensor], Tensors]
    by_slot: Callable[[torch.Tensor], torch.Tensor]
    by_rank: Callable[[torch.Tensor], torch.Tensor]
    combine: Callable[[torch.Tensor], torch.Tensor]


def ours(rank: Rank) -> Steps:
    found = slot_permutation(rank.map_TE, rank.quotas, torch.from_numpy(rank.quotas.runs))
    return Steps(found.to_send, found.by_slot, found.by_rank, found.combine)


def megatrons(rank: Rank) -> Steps:
    """Return Megatron's permutations over the map [T, S], as its dispatcher calls them."""
    layout = rank.layout
    slot_expert_S = torch.from_numpy(layout.slot_expert_S.astype(np.int64))
    ranges = torch.from_numpy(slot_ranges(rank.quotas))
    columns_NC = torch.from_numpy(rank.quotas.columns_NC)
    chunks = torch.arange(layout.num_slots)
    tokens_TP: list[torch.Tensor] = []

    def to_send(hidden_TH: torch.Tensor, probs_TE: torch.Tensor) -> Tensors:
        probs_TS, map_TS = to_slots(probs_TE, rank.map_TE, slot_expert_S, ranges)
        sent = rank.quotas.num_sent
        hidden, probs, tokens, *_ = permute(hidden_TH, map_TS, probs_TS, num_out_tokens=sent)
        tokens_TP[:] = [tokens]
        return hidden, probs

    return Steps(
        to_send,
        lambda rows: sort_chunks_by_idxs(
            rows, columns_NC.ravel(), chunks.reshape(-1, layout.capacity).T.ravel()
        )[0],
        lambda rows: sort_chunks_by_idxs(
            rows, columns_NC.T.ravel(), chunks.reshape(layout.capacity, -1).T.ravel()
        )[0],
        lambda rows: unpermute(rows, tokens_TP[0], torch.Size((len(rank.map_TE), rows.shape[-1]))),
    )


def whole_dispatch(ranks: list[Rank], make: Callable[[Rank], Steps], dtype: torch.dtype) -> Tensors:
    """Return all tensors and gradients of a dispatch, weighing experts and a combine."""
    generator = torch.Generator().manual_seed(7)
    steps = [make(rank) for rank in ranks]
    there = [rank.quotas.input_splits_N for rank in ranks]
    back_again, whole = [rank.quotas.output_splits_N for rank in ranks], [range(len(ranks))]
    hidden, probs, weights = [], [], []
    for rank in ranks:
        shape = (len(rank.map_TE), HIDDEN)
        hidden += [torch.randn(shape, generator=generator).to(dtype).requires_grad_()]
        weights += [torch.randn(shape, generator=generator).to(dtype)]
        chosen = torch.rand(rank.map_TE.shape, generator=generator) * rank.map_TE
        probs += [chosen.requires_grad_()]
    sent = [s.to_send(h, p) for s, h, p in zip(steps, hidden, probs, strict=True)]
    arrived = exchange([x for x, _ in sent], there, whole)
    arrived_probs = exchange([p for _, p in sent], there, whole)
    inputs = [s.by_slot(x) for s, x in zip(steps, arrived, strict=True)]
    input_probs = [s.by_slot(p) for s, p in zip(steps, arrived_probs, strict=True)]
    outputs = [(x * x * p[:, None]).to(dtype) for x, p in zip(inputs, input_probs, strict=True)]
    sorted_back = [s.by_rank(x) for s, x in zip(steps, outputs, strict=True)]
    back = exchange(sorted_back, back_again, whole)
    combined = [s.combine(x) for s, x in zip(steps, back, strict=True)]
    torch.autograd.backward(combined, weights)
    grads = [x.grad for x in (*hidden, *probs)]
    on_the_way = (*inputs, *input_probs, *outputs, *back, *combined)
    return (*(x.detach() for x in on_the_way), *(g for g in grads if g is not None))


def assert_equal_bits(ranks: list[Rank], dtype: torch.dtype) -> None:
    mine, theirs = whole_dispatch(ranks, ours, dtype), whole_dispatch(ranks, megatrons, dtype)
    assert len(mine) == len(theirs) == 7 * len(ranks)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    experts=st.integers(1, 12),
    spare=st.integers(0, 3),
    topk=st.integers(1, 8),
    hot=st.booleans(),
    uneven=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_a_whole_dispatch_and_its_gradients_are_bitwise_those_of_megatrons_permutations(
    tokens: list[int],
    experts: int,
    spare: int,
    topk: int,
    hot: bool,
    uneven: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    ranks = len(tokens)
    capacity = min(experts, -(-experts // ranks) + spare)
    layout = ExpertLayout.random(ranks, capacity, experts, (seed,))
    routed = route(layout, tokens, min(topk, experts), seed, hot=hot, uneven=uneven)
    assert_equal_bits(routed, dtype)


def test_4096_slots_and_few_tokens() -> None:
    layout = ExpertLayout.random(8, 512, 1024, (1,))
    routed = route(layout, [6, 0, 1, 2, 3, 6, 5, 4], 8, seed=2, hot=True)
    assert_equal_bits(routed, torch.bfloat16)


def test_what_is_kept_for_backward_does_not_grow_with_slots() -> None:
    """Expect 16 bytes for each row that is sent, and 8 for each that is received."""
    tokens, topk = 256, 4

    def kept(make: Callable[[Rank], Steps], slots: int) -> int:
        layout = ExpertLayout.random(1, slots, slots, (5,))
        (rank,) = route(layout, [tokens], topk)
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        hidden = torch.rand(tokens, HIDDEN, requires_grad=True)
        probs = torch.rand(tokens, slots).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            steps = make(rank)
            rows, row_probs = steps.to_send(hidden, probs)
            rows, row_probs = steps.by_slot(rows), steps.by_slot(row_probs)
            total = steps.combine(steps.by_rank(rows)).sum() + row_probs.sum()
        total.backward()
        return sum(storage.nbytes() for storage in storages.values())

    pairs = (tokens - 1) * topk
    assert kept(ours, 16) == kept(ours, 256) == 24 * pairs
    assert kept(megatrons, 256) > 9 * tokens * 256


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (6, 50)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_places_of_true_flags_are_those_of_nonzero(shape: tuple[int, int], share: float) -> None:
    flags = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    for one in (flags, flags.t()):
        expected = one.reshape(-1).nonzero().view(-1)
        found = true_places(one, len(expected))
        assert found.dtype == torch.int64 and torch.equal(found, expected)


def test_freed_copies_come_back_in_every_form_that_was_saved() -> None:
    rows_YH = torch.arange(8.0).view(2, 4).requires_grad_()
    map_ = row_map(torch.tensor([0, 1, 1, 0], dtype=torch.int32), 2)
    copies_XH = map_.spread(rows_YH)
    expected = copies_XH.detach().clone()
    factor_HH = torch.arange(16.0).view(4, 4).requires_grad_()
    forms = [copies_XH, copies_XH.t(), copies_XH[1:]]
    output = torch.cat([form @ factor_HH for form in forms])
    map_.free_until_backward(copies_XH, rows_YH, output)
    weights = torch.arange(44.0).view(11, 4)
    (found_HH,) = torch.autograd.grad((output * weights).sum(), factor_HH)
    saved = torch.cat([expected, expected.t(), expected[1:]])
    torch.testing.assert_close(found_HH, saved.t() @ weights)


@pytest.mark.parametrize("sizes", [[1, 3], [4, 0]])
def test_of_experts_parts_rows_are_kept_until_backward_and_no_copy(sizes: list[int]) -> None:
    rows_YH = torch.arange(8.0).view(2, 4).requires_grad_()
    map_ = row_map(torch.tensor([0, 1, 1, 0], dtype=torch.int32), 2)
    arrived_YH = rows_YH.clone()
    copies_XH = map_.spread(arrived_YH)
    factors = [torch.ones(4, 3, requires_grad=True) for _ in range(2)]
    parts = copies_XH.split(sizes)
    expected = [part.detach().sum(0)[:, None].expand(4, 3).clone() for part in parts]
    output = torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)])
    copies, rows = copies_XH.untyped_storage(), weakref.ref(arrived_YH.untyped_storage())
    map_.free_until_backward(copies_XH, arrived_YH, output)
    del arrived_YH, copies_XH, parts
    assert copies.nbytes() == 0 and rows() is not None
    output.sum().backward()
    assert rows() is None, "kept by the output's graph"
    for factor, grad_HF in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad, grad_HF)


@pytest.mark.parametrize("in_parts", [False, True])
def test_experts_rows_stay_where_megatron_frees_those_that_arrived(in_parts: bool) -> None:
    """Combined 1F1B frees arrived rows, from which freed copies could not come back."""
    rows_YH = torch.arange(8.0).view(2, 4)
    map_ = row_map(torch.tensor([0, 1, 1, 0], dtype=torch.int32), 2)
    copies_XH = map_.spread(rows_YH)
    expected = copies_XH.sum(0)[:, None].expand(4, 3).clone()
    factor = torch.ones(4, 3, requires_grad=True)
    dispatcher: Any = SimpleNamespace(
        config=SimpleNamespace(overlap_moe_expert_parallel_comm=in_parts),
        _arrivals=SimpleNamespace(rows=map_),
        _experts_input=(rows_YH, copies_XH),
        _rows=None,
        _second=None,
    )
    summed = NodeTokenDispatcher.combine_preprocess(dispatcher, copies_XH @ factor)
    are_kept = copies_XH.untyped_storage().nbytes() > 0
    assert are_kept == in_parts
    if in_parts:
        rows_YH.untyped_storage().resize_(0)
    summed.sum().backward()
    torch.testing.assert_close(factor.grad, expected)


def test_copies_that_no_expert_saved_do_not_come_back() -> None:
    rows_YH = torch.ones(1, 4, requires_grad=True)
    map_ = row_map(torch.tensor([0, 0], dtype=torch.int32), 1)
    copies_XH = map_.spread(rows_YH)
    output, memory = copies_XH + 1, weakref.ref(copies_XH.untyped_storage())
    map_.free_until_backward(copies_XH, rows_YH, output)
    del copies_XH
    assert memory() is None
    with mock.patch.object(row_map_module, "_refill") as refill:
        output.sum().backward()
    refill.assert_not_called()


def test_copies_of_experts_without_a_backward_pass_stay() -> None:
    map_, rows_YH = row_map(torch.tensor([0, 0], dtype=torch.int32), 1), torch.ones(1, 4)
    copies_XH = map_.spread(rows_YH)
    map_.free_until_backward(copies_XH, rows_YH, copies_XH + 1)
    assert copies_XH.tolist() == [[1.0] * 4] * 2


def test_the_backward_pass_of_experts_sees_their_own_parameters() -> None:
    """Megatron's fused kernels mark what they see, and the mark is read from the parameter."""
    seen: list[Any] = []

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input_XH: torch.Tensor, weight_HF: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(input_XH, weight_HF)
            return input_XH @ weight_HF

        @staticmethod
        def backward(ctx: Any, grad_XF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            input_XH, weight_HF = ctx.saved_tensors
            seen.append(weight_HF)
            return grad_XF @ weight_HF.t(), input_XH.t() @ grad_XF

    weight_HF = torch.nn.Parameter(torch.ones(4, 3))
    rows_YH = torch.ones(1, 4, requires_grad=True)
    map_ = row_map(torch.tensor([0, 0], dtype=torch.int32), 1)
    copies_XH = map_.spread(rows_YH)
    output: torch.Tensor = Linear.apply(copies_XH, weight_HF)
    map_.free_until_backward(copies_XH, rows_YH, output)
    output.sum().backward()
    assert seen[0] is weight_HF
    torch.testing.assert_close(weight_HF.grad, torch.full((4, 3), 2.0))


def test_copies_in_bf16_are_rounded_once() -> None:
    copies_XH = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert sum_copies(copies_XH, 1, torch.zeros(3, dtype=torch.int32)).item() == 258


@pytest.mark.parametrize(("number", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_places_beyond_int32_are_counted_in_int64(number: int, dtype: torch.dtype) -> None:
    flags = mock.Mock(**{"numel.return_value": number})
    with mock.patch.object(torch, "repeat_interleave"):
        true_places(flags, 1)
    flags.reshape.return_value.to.assert_called_once_with(dtype)


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
