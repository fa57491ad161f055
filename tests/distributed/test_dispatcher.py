"""Dispatchers over slots agree: own permutations and stock's, All-to-All and the flex dispatcher's.

DeepEP's and HybridEP's buffers are replaced. Helpers run on ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.parity.flags import command_line
from tests.parity.rows import DEEPEP
from tests.token_exchange import (
    HIDDEN,
    Case,
    SharedExperts,
    make_dispatcher,
    noting_times,
    plan_of,
    routing_maps,
)


@dataclass
class Outcome:
    """Tensors of a whole dispatch: sent rows, experts' inputs, returned rows, and gradients."""

    sent: list[Any]
    experts: list[Any]
    returned: list[Any]
    combined: list[Any]
    calls: list[str]


def make_plan(capacity: int, experts: int, topk: int, tokens: list[int]) -> tuple[Any, Any]:
    import torch.distributed as dist

    case = Case(tuple(tokens), node_size=1, capacity=capacity, experts=experts, top_k=topk)
    return plan_of(case, dist.get_rank()), routing_maps(case)[dist.get_rank()]


def dispatch(plan: Any, map_TE: Any, topk: int, path: str, with_shared: bool) -> Outcome:
    import torch
    import torch.distributed as dist

    from megatron_laer.runtime.comm import copies

    generator = torch.Generator().manual_seed(dist.get_rank())
    hidden = torch.randn(1, len(map_TE), HIDDEN, generator=generator).requires_grad_()
    probs = torch.rand(map_TE.shape, generator=generator) * map_TE
    probs[:, 0] = 0  # tokens go to expert 0 even with probability zero
    probs.requires_grad_()
    weight = torch.randn(hidden.shape, generator=generator)
    shared = SharedExperts() if with_shared else None
    dispatcher = make_dispatcher(plan, topk, path, shared=shared)
    dispatcher.start_shared_experts(hidden)
    uploads = mock.Mock(side_effect=copies.upload)
    with (
        mock.patch.object(copies, "upload", uploads),
        mock.patch.object(copies.Upload, "start", uploads),
    ):
        sent = dispatcher.dispatch_preprocess(hidden, map_TE, probs)
    assert uploads.call_count == 1, "one piece of memory for all that the device must know"
    inputs, tokens_C, weights = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))
    assert tokens_C.tolist() == plan.quotas.tokens_C
    outputs = dispatcher.combine_preprocess(inputs * inputs * weights[:, None])
    combined = dispatcher.combine_postprocess(dispatcher.token_combine(outputs))
    assert combined.shape == hidden.shape
    combined.backward(weight)
    found = [*sent], [inputs, weights], [outputs], [combined, hidden.grad, probs.grad]
    detached = ([tensor.detach() for tensor in tensors] for tensors in found)
    return Outcome(*detached, shared.calls if shared else [])


@contextlib.contextmanager
def on_gloo() -> Iterator[None]:
    """Yield a process group of all ranks, and check that it is freed afterwards."""
    import torch.distributed as dist
    from megatron.core.transformer.moe import fused_a2a

    dist.init_process_group("gloo")
    try:
        yield
    finally:
        fused_a2a._buffer = None
        fused_a2a.reset_hybrid_ep_buffer()
        dist.destroy_process_group()


def both_paths(capacity: int, experts: int, topk: int, tokens: list[int], shared: bool) -> int:
    import torch
    from megatron.core.transformer.moe import token_dispatcher

    # Transformer Engine's kernels are for CUDA: Megatron's other ones do the same.
    names = ("permute", "unpermute", "sort_chunks_by_idxs")
    stock = {name: getattr(token_dispatcher, name) for name in names}
    with on_gloo():
        for name in names:
            unfused = lambda *a, stock=stock[name], **kw: stock(*a, **{**kw, "fused": False})  # noqa: E731
            setattr(token_dispatcher, name, unfused)
        try:
            plan, map_TE = make_plan(capacity, experts, topk, tokens)
            mine, stocks = (
                dispatch(plan, map_TE, topk, path, shared) for path in ("own", "stock's")
            )
        finally:
            for name in names:
                setattr(token_dispatcher, name, stock[name])
    assert mine.calls == stocks.calls
    assert len(mine.calls) == (7 if shared else 0), mine.calls
    assert mine.calls[:1] == ["pre_forward_comm"] * shared, mine.calls
    pairs = [
        pair
        for part in ("sent", "experts", "returned", "combined")
        for pair in zip(getattr(mine, part), getattr(stocks, part), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in pairs)
    return len(pairs)


def flex_and_all_to_all(
    backend: str, capacity: int, experts: int, topk: int, tokens: list[int], shared: bool
) -> None:
    """Check that experts get the same bits from either dispatcher; sums have other orders."""
    import torch

    with on_gloo():
        plan, map_TE = make_plan(capacity, experts, topk, tokens)
        mine, flex = (dispatch(plan, map_TE, topk, path, shared) for path in ("own", backend))
        rerun = dispatch(plan.for_rerun(map_TE), ~map_TE, topk, backend, False)
    assert sorted(set(flex.calls)) == sorted({*mine.calls, *(["wait_current_stream"] * shared)})
    for a, b in zip(mine.experts, flex.experts, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(mine.combined, flex.combined, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(rerun.experts[0], flex.experts[0]), "a re-run follows its plan"


def exchanges_noted(backend: str) -> list[list[tuple[str, str]]]:
    import torch

    found = []
    with on_gloo():
        plan, map_TE = make_plan(3, 4, 2, [40, 33])
        for path in ("own", backend):
            noted, times = noting_times()
            dispatcher = make_dispatcher(plan, 2, path, times=times)
            hidden, probs = torch.rand(len(map_TE), HIDDEN, requires_grad=True), map_TE.float()
            sent = dispatcher.dispatch_preprocess(hidden, map_TE, probs.requires_grad_())
            inputs, *_ = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))
            outputs = dispatcher.token_combine(dispatcher.combine_preprocess(inputs * inputs))
            dispatcher.combine_postprocess(outputs).sum().backward()
            assert hidden.grad is not None and len(noted) == 8
            found.append(noted)
    return found


def flex_against_another_plan(backend: str) -> list[str]:
    """Return errors for numbers other than planned: found late, at once, and at the step's end."""
    import torch
    import torch.distributed as dist

    from megatron_laer.layer.dispatch.flex import _Received

    with on_gloo():
        plan, map_TE = make_plan(3, 4, 2, [40, 33])
        late = SimpleNamespace(query=lambda: False)
        dispatcher = make_dispatcher(plan, 2, backend)
        dispatcher._received.append(_Received("layer 7", [1, 2, 3], torch.tensor([3, 2, 1]), late))
        hidden, probs = torch.zeros(len(map_TE), HIDDEN), map_TE.float()

        def run() -> None:
            dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, map_TE, probs))

        run()  # numbers that have not arrived are not awaited
        late.query = lambda: True
        with pytest.raises(RuntimeError) as first:
            run()
        run()
        assert not dispatcher._received
        # The same total, on other slots.
        others = dataclasses.replace(plan.quotas, tokens_C=plan.quotas.tokens_C[::-1])
        wrong = dataclasses.replace(plan, quotas=others)
        dispatcher.begin(dataclasses.replace(dispatcher._current, plan=wrong))
        assert wrong.quotas.tokens_C != plan.quotas.tokens_C
        with pytest.raises(RuntimeError) as second:
            run()
        numbers = (
            f"brought {plan.quotas.tokens_C} tokens to the slots of rank {dist.get_rank()}, and the"
        )
        assert f"layer 1: {backend} {numbers} plan says {wrong.quotas.tokens_C}" in str(
            second.value
        )
        awaited = mock.Mock(**{"query.return_value": False})
        dispatcher._received.append(_Received("layer 9", [1], torch.tensor([2]), awaited))
        with pytest.raises(RuntimeError) as third:
            dispatcher.end_step()
        awaited.synchronize.assert_called_once()
        dispatcher.end_step()
    return [str(error.value) for error in (first, second, third)]


SHARED = pytest.mark.parametrize("shared", [False, True], ids=["routed", "with shared experts"])
SHAPES = pytest.mark.parametrize(
    ("capacity", "experts", "topk", "tokens"),
    [
        (3, 4, 2, [40, 33]),
        (1, 2, 1, [5, 9]),
        (8, 9, 8, [17, 0]),
        (2, 3, 2, [7, 4]),
        (2, 3, 3, [0, 0]),
    ],
)
BACKENDS = pytest.mark.parametrize("backend", ["deepep", "hybridep"])


@SHARED
@SHAPES
def test_own_permutations_and_stocks_give_the_same_bits(
    ranks: RankPools, capacity: int, experts: int, topk: int, tokens: list[int], shared: bool
) -> None:
    assert ranks(2).run(both_paths, capacity, experts, topk, tokens, shared) == [8, 8]


@BACKENDS
@SHARED
@SHAPES
def test_the_flex_dispatcher_brings_experts_the_bits_of_the_all_to_all_one(
    ranks: RankPools,
    backend: str,
    capacity: int,
    experts: int,
    topk: int,
    tokens: list[int],
    shared: bool,
) -> None:
    ranks(2).run(flex_and_all_to_all, backend, capacity, experts, topk, tokens, shared)


@BACKENDS
def test_what_a_buffer_counted_is_compared_with_the_plan_once_it_is_there(
    ranks: RankPools, backend: str
) -> None:
    for earlier, at_once, at_the_end in ranks(2).run(flex_against_another_plan, backend):
        assert f"layer 7: {backend} brought [3, 2, 1] tokens" in earlier
        assert "the plan says [1, 2, 3]" in earlier
        assert "give --moe-token-dispatcher-type alltoall" in at_once
        assert f"layer 9: {backend} brought [2] tokens" in at_the_end


def count_ends(flags: list[str]) -> int:
    """Train; return how often the layers' flex dispatchers were notified of a step's end."""
    from megatron_laer.layer.dispatch.flex import SlotFlexDispatcher

    with mock.patch.object(SlotFlexDispatcher, "end_step", autospec=True) as told:
        train(flags)
    return told.call_count


def test_every_layers_dispatcher_is_told_of_every_steps_end(
    ranks: RankPools, text_data: str
) -> None:
    steps, layers = 3, 2
    command = command_line(
        text_data,
        " --expert-parallel-mode fsep --fsep-sharding rows" + DEEPEP,
        experts=4,
        steps=steps,
    )
    assert ranks(2).run(count_ends, command) == [steps * layers] * 2


@BACKENDS
def test_either_dispatcher_times_the_same_exchanges(ranks: RankPools, backend: str) -> None:
    for all_to_all, flex in ranks(2).run(exchanges_noted, backend):
        assert flex == all_to_all
