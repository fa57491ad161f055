"""`auto` chooses the exchange with the lower predicted time, and the guard prices it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_laer.choices import Auto, Dispatch, Recompute, TokenExchange
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Link
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.token_exchange import (
    choose_token_exchange,
    token_seconds,
    with_token_exchange,
)
from megatron_laer.runtime.build import token_dispatch
from tests.costs import make_costs
from tests.placed import placed

RANK, NODE = TokenExchange
QWEN = CostModel(
    cluster=load_cluster("a100-4x8-ib800"), hidden=4096, ffn=1536, gated=True, bytes_per_element=2
)


@pytest.mark.parametrize(
    ("geometry", "top_k", "tokens"),
    [
        (Geometry(32, 128, 4, 8), 1, 8192),  # one row per token either way
        (Geometry(32, 128, 4, 8), 8, 16),  # latencies outweigh rows
        (Geometry(1, 8, 8, 1), 2, 8192),  # nothing is sent
        (Geometry(8, 8, 8, 4), 2, 8192),  # every rank has every expert
    ],
)
def test_auto_takes_rank_where_nothing_is_to_be_gained(
    geometry: Geometry, top_k: int, tokens: int
) -> None:
    assert choose_token_exchange(QWEN, geometry, top_k, tokens) == RANK
    alike = make_costs(intra=Link(1e10, 1e-6), inter=Link(1e10, 1e-6), hidden=4096)
    assert choose_token_exchange(alike, Geometry(32, 128, 4, 8), 8, 8192) == RANK
    assert choose_token_exchange(QWEN, Geometry(32, 128, 4, 8), 8, 8192) == NODE
    with pytest.raises(ValueError, match=r"8 tokens with 9 of 8 experts each: give at least one"):
        choose_token_exchange(QWEN, Geometry(4, 8, 2, 2), 9, 8)


def test_seconds_are_those_of_the_rows_by_arithmetic() -> None:
    """Use nodes of one rank and one expert: 6 pairs of 8 leave, on 3·(1 - 1/2^…) distinct ranks."""
    geometry, tokens = Geometry(4, 128, 32, 1), 4096
    costs = make_costs(inter=Link(1e9, 0.0), hidden=512)
    seconds = token_seconds(costs, geometry, 8, tokens)
    row_s = tokens * 1024 / 1e9
    assert seconds[RANK] == pytest.approx(4 * 6 * row_s, rel=1e-3)
    # A quarter of the experts is on each rank: 1 - (3/4)^8 if chosen with replacement.
    assert seconds[NODE] == pytest.approx(4 * 3 * (1 - 0.75**8) * row_s, rel=0.03)


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
@pytest.mark.parametrize("node_size", [1, 2, 4, 8])
def test_a_layer_is_priced_as_its_exchange_is(node_size: int, recompute: Recompute) -> None:
    """With free compute and even counts, a layer costs its `token_seconds` for either exchange."""
    geometry = Geometry(8, 64, 8, node_size)
    costs = make_costs(
        points=((1, 1e30),),
        intra=Link(3e10, 1e-5),
        inter=Link(1e9, 2e-5),
        hidden=512,
        recompute=recompute,
    )
    layout = ExpertLayout.static(8, 8, 64)
    counts_NE = np.full((8, 64), 1024 * 8 // 64, dtype=np.int64)
    seconds = token_seconds(costs, geometry, 8, 1024)
    for exchange in TokenExchange:
        priced = with_token_exchange(costs, Dispatch(exchange), geometry, 8, 1024)
        layer_s = priced.layer_seconds(counts_NE, placed(layout, node_size))
        assert layer_s == pytest.approx(seconds[exchange], rel=1e-6)
        assert priced.least_layer_seconds(counts_NE, geometry) <= layer_s


@pytest.mark.parametrize(("node_size", "stages_s", "beside"), [(1, 20e-6, 1), (2, 30e-6, 2)])
def test_a_rerun_has_rows_and_their_places_again_and_sizes_only_once(
    node_size: int, stages_s: float, beside: int
) -> None:
    """Give links latencies only: 20 µs between nodes and 10 inside; waits are as long."""
    geometry = Geometry(8, 64, 8, node_size)
    free = make_costs(intra=Link(math.inf, 1e-5), inter=Link(math.inf, 2e-5))
    for recompute, forwards in ((Recompute.NONE, 1), (Recompute.COMPUTE, 1), (Recompute.FULL, 2)):
        seconds = token_seconds(replace(free, recompute=recompute), geometry, 8, 1024)
        passes = 2 * forwards + 2
        assert seconds[RANK] == pytest.approx(passes * 20e-6)
        sizes_s, places_s = 2 * 20e-6, beside * 20e-6
        assert seconds[NODE] == pytest.approx(passes * stages_s + sizes_s + forwards * places_s)


def test_auto_is_decided_for_the_tokens_of_the_command_line() -> None:
    from megatron_laer.layer.moe_layer import _tokens

    config, geometry = FSEPConfig(token_exchange=Auto.AUTO), Geometry(32, 128, 4, 8)
    model = SimpleNamespace(
        context_parallel_size=2,
        tensor_model_parallel_size=4,
        moe_router_topk=8,
        moe_token_dispatcher_type="alltoall",
        moe_permute_fusion=False,
    )
    found = []
    for sequence in (64, 32768):
        args = SimpleNamespace(micro_batch_size=2, seq_length=sequence)
        tokens = _tokens(args, model)
        assert tokens == sequence // 4
        found.append(token_dispatch(config, QWEN, geometry, model, tokens))
    assert found == [Dispatch.RANK, Dispatch.NODE]
    model.moe_token_dispatcher_type = "flex"
    assert token_dispatch(config, QWEN, geometry, model, tokens) == Dispatch.FLEX
