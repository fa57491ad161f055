"""The dispatcher's own permutations give the bits that stock's give over the token → slot map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from megatron_laer.testing.ranks import RankPool

HIDDEN = 6


class SharedExperts:
    """Notes in which order the dispatcher calls it, and gives a constant output."""

    use_shared_expert_gate = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: self.calls.append(name)

    def pre_forward_comm(self, hidden: Any) -> None:
        self.calls.append("pre_forward_comm")
        self.hidden = hidden

    def get_output(self) -> Any:
        self.calls.append("get_output")
        return self.hidden * 2


def both_paths(capacity: int, experts: int, topk: int, tokens: list[int], shared: bool) -> int:
    """On a rank: a whole dispatch by either path; returns the tensors that were compared."""
    from dataclasses import dataclass
    from types import SimpleNamespace

    import numpy as np
    import torch
    import torch.distributed as dist
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_laer.config import Split
    from megatron_laer.dispatch import permutation
    from megatron_laer.dispatch.dispatcher import SlotDispatch, SlotTokenDispatcher
    from megatron_laer.layout import ExpertLayout
    from megatron_laer.planner.splits import RankQuotas, solve_quotas
    from megatron_laer.runtime.comm import upload
    from megatron_laer.runtime.microbatch_plan import MicrobatchPlan

    @dataclass
    class Outcome:
        tensors: list[torch.Tensor]
        calls: list[str]

    def dispatch(plan: MicrobatchPlan, map_TE: torch.Tensor, fused: bool) -> Outcome:
        generator = torch.Generator().manual_seed(dist.get_rank())
        hidden = torch.randn(1, len(map_TE), HIDDEN, generator=generator).requires_grad_()
        probs = (torch.rand(map_TE.shape, generator=generator) * map_TE).requires_grad_()
        weight = torch.randn(hidden.shape, generator=generator)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            num_moe_experts=plan.layout.num_slots,
            moe_router_topk=topk,
            moe_router_pre_softmax=True,
            moe_token_dispatcher_type="alltoall",
        )
        groups = SimpleNamespace(ep=dist.group.WORLD, expt_tp=None, tp_ep=dist.group.WORLD)
        first = capacity * dist.get_rank()
        local = list(range(first, first + capacity))
        dispatcher = SlotTokenDispatcher(capacity, local, config=config, pg_collection=groups)
        config.moe_permute_fusion = fused
        config.moe_shared_expert_overlap = shared
        experts_ = SharedExperts()
        if shared:
            dispatcher.set_shared_experts(experts_)
        dispatcher.start_shared_experts(hidden)
        dispatcher.begin(SlotDispatch(plan, "layer 1", None))
        uploads = mock.Mock(side_effect=upload.upload)
        with (
            mock.patch.object(upload, "upload", uploads),
            mock.patch.object(permutation, "upload", uploads),
        ):
            sent = dispatcher.dispatch_preprocess(hidden, map_TE, probs)
        assert uploads.call_count == 1, "one piece of memory for all that the device must know"
        inputs, tokens_C, weights = dispatcher.dispatch_postprocess(
            *dispatcher.token_dispatch(*sent)
        )
        assert tokens_C.tolist() == plan.quotas.tokens_C
        outputs = dispatcher.combine_preprocess(inputs * inputs * weights[:, None])
        combined = dispatcher.combine_postprocess(dispatcher.token_combine(outputs))
        assert combined.shape == hidden.shape
        combined.backward(weight)
        tensors = [*sent, inputs, weights, outputs, combined, hidden.grad, probs.grad]
        return Outcome([tensor.detach() for tensor in tensors], experts_.calls)

    # Transformer Engine's kernels are for CUDA: Megatron's other ones do the same.
    names = ("permute", "unpermute", "sort_chunks_by_idxs")
    stock = {name: getattr(token_dispatcher, name) for name in names}
    dist.init_process_group("gloo")
    try:
        for name in names:
            unfused = lambda *a, stock=stock[name], **kw: stock(*a, **{**kw, "fused": False})  # noqa: E731
            setattr(token_dispatcher, name, unfused)
        rank, size = dist.get_rank(), dist.get_world_size()
        layout = ExpertLayout.random(size, capacity, experts, (topk,))
        generator = torch.Generator().manual_seed(rank)
        scores_TE = torch.rand(tokens[rank], experts, generator=generator)
        map_TE = torch.zeros(scores_TE.shape, dtype=torch.bool)
        map_TE.scatter_(1, scores_TE.topk(topk, dim=1).indices, True)
        counts: list[Any] = [None] * size
        dist.all_gather_object(counts, map_TE.sum(0).numpy())
        quotas = solve_quotas(Split.EXACT, np.stack(counts), layout, 1)
        slot_expert_S = torch.from_numpy(layout.slot_expert_S.astype(np.int64))
        index: Any = SimpleNamespace(layout=layout, slot_expert_S=slot_expert_S)
        plan = MicrobatchPlan(
            SimpleNamespace(index=index),  # type: ignore[arg-type]
            RankQuotas.of(layout, quotas.rank_row(rank), quotas.rank_columns(rank)),
        )
        mine, stocks = dispatch(plan, map_TE, fused=False), dispatch(plan, map_TE, fused=True)
        assert mine.calls == stocks.calls
        assert len(mine.calls) == (7 if shared else 0), mine.calls
        assert mine.calls[:1] == ["pre_forward_comm"] * shared, mine.calls
        for a, b in zip(mine.tensors, stocks.tensors, strict=True):
            assert torch.equal(a, b)
        return len(mine.tensors)
    finally:
        for name in names:
            setattr(token_dispatcher, name, stock[name])
        dist.destroy_process_group()


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "with shared experts"])
@pytest.mark.parametrize(
    ("capacity", "experts", "topk", "tokens"),
    [(3, 4, 2, [40, 33]), (1, 2, 1, [5, 9]), (8, 9, 8, [17, 0]), (2, 3, 3, [0, 0])],
)
def test_own_permutations_and_stocks_give_the_same_bits(
    ranks: Callable[[int], RankPool],
    capacity: int,
    experts: int,
    topk: int,
    tokens: list[int],
    shared: bool,
) -> None:
    assert ranks(2).run(both_paths, capacity, experts, topk, tokens, shared) == [8, 8]
