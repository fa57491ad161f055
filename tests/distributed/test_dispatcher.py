"""Dispatchers over slots agree: own permutations and stock's, All-to-All and the flex dispatcher's.

DeepEP's and HybridEP's buffers are replaced. Helpers run on ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from tests.distributed.conftest import Trainings
from tests.parity.row import FSEP
from tests.parity.rows import DEEPEP
from tests.token_exchange import (
    HIDDEN,
    Case,
    Outcome,
    gloo_groups,
    make_dispatcher,
    plan_of,
    routing_maps,
    run,
)

FLEX = ("deepep", "hybridep")
CASES = (
    Case((40, 33), 1, capacity=3, experts=4, top_k=2),
    Case((5, 9), 1, capacity=1, experts=2, top_k=1),
    Case((17, 0), 1, capacity=8, experts=9, top_k=8),
    Case((7, 4), 1, capacity=2, experts=3, top_k=2),
    Case((0, 0), 1, capacity=2, experts=3, top_k=3),
)


@contextlib.contextmanager
def ranks_and_buffers() -> Iterator[FSEPGroups]:
    """Yield groups of all ranks, and drop the flex dispatchers' buffers afterwards."""
    from megatron.core.transformer.moe import fused_a2a

    with gloo_groups(1) as groups:
        try:
            yield groups
        finally:
            fused_a2a._buffer = None
            fused_a2a.reset_hybrid_ep_buffer()


def by_every_path(case: Case, with_shared: bool) -> dict[str, Outcome]:
    """Exchange tokens by each dispatcher, and by flex ones again as under a checkpoint."""
    from megatron.core.transformer.moe import token_dispatcher

    def unfused(function: Any) -> Any:
        return lambda *args, **named: function(*args, **named | {"fused": False})

    # Transformer Engine's kernels are for CUDA: Megatron's other ones do the same.
    names = ("permute", "unpermute", "sort_chunks_by_idxs")
    others = {name: unfused(getattr(token_dispatcher, name)) for name in names}
    with ranks_and_buffers() as groups:
        with mock.patch.multiple(token_dispatcher, **others):
            found = {"stock's": run(case, groups, "stock's", with_shared=with_shared)}
        for path in ("own", *FLEX):
            found[path] = run(case, groups, path, with_shared=with_shared)
        for path in FLEX:
            found[f"rerun by {path}"] = run(case, groups, path, rerun=True)
    return found


@pytest.mark.parametrize("with_shared", [False, True], ids=["routed", "with shared experts"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tokens}")
def test_dispatchers_agree(ranks: RankPools, case: Case, with_shared: bool) -> None:
    """Experts get the same bits from all; sums of the flex dispatchers have other orders."""
    for found in ranks(2).run(by_every_path, case, with_shared):
        own, stocks = found.pop("own"), found["stock's"]
        for path, other in found.items():
            assert torch.equal(other.experts[0], own.experts[0]), path
        for path in ("stock's", *FLEX):
            other = found[path]
            assert torch.equal(other.experts[1], own.experts[1]), path
            results = zip((other.combined, *other.grads), (own.combined, *own.grads), strict=True)
            for theirs, mine in results:
                if path == "stock's":
                    assert torch.equal(theirs, mine)
                torch.testing.assert_close(theirs, mine)
            assert other.timed == own.timed or path == "stock's"
        assert len(own.timed) == 8
        assert own.calls == stocks.calls and len(own.calls) == 7 * with_shared
        assert own.calls[:1] == ["pre_forward_comm"] * with_shared
        for path in FLEX:
            waits = ["wait_current_stream"] * with_shared
            assert {*found[path].calls} == {*own.calls, *waits}


def flex_against_another_plan(backend: str) -> list[str]:
    """Return errors for numbers other than planned: found late, at once, and at the step's end."""
    import torch.distributed as dist

    from megatron_laer.layer.dispatch.flex import _Received

    with ranks_and_buffers():
        plan = plan_of(CASES[0], dist.get_rank())
        map_TE = routing_maps(CASES[0])[dist.get_rank()]
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


@pytest.mark.parametrize("backend", FLEX)
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


def test_every_layers_dispatcher_is_told_of_every_steps_end(trained: Trainings) -> None:
    steps, layers = 3, 2
    assert trained.each(FSEP + DEEPEP, by=count_ends, steps=steps) == [steps * layers] * 2
