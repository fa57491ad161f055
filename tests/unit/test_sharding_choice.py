"""`--fsep-sharding auto` and the slots of home experts follow from predicted time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_laer.choices import Auto, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.life import Kind
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Contention, Link, SolveTime
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.expected_gain import expected_gain
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.outcome import stock_placement
from megatron_laer.planner.sharding_choice import choose_geometry, planned_seconds
from megatron_laer.planner.typical import skewed_counts_NE
from tests.costs import make_costs


def priced_as(costs: CostModel, pairs: int) -> Callable[[Geometry], CostModel]:
    return lambda geometry: replace(costs.with_exchange(Auto.AUTO, geometry), pairs_per_rank=pairs)


# N, E, ranks per node; settings; the sharding that is taken, and its slots.
SHARDINGS = [
    # Without load on one rank, the others have four thirds of the mean.
    ((4, 8, 4), {}, Sharding.EXPERTS, 4),
    ((4, 8, 4), {"capacity": 5}, Sharding.EXPERTS, 5),
    ((4, 8, 4), {"sharding": "experts"}, Sharding.EXPERTS, 4),
    ((4, 8, 4), {"sharding": "rows"}, Sharding.ROWS, 3),
    ((4, 8, 4), {"planner": "laer"}, Sharding.ROWS, 3),
    ((4, 8, 4), {"capacity": 2}, Sharding.ROWS, 2),
    ((4, 6, 4), {}, Sharding.ROWS, 3),
    # Four hot experts of one rank need two slots on the other one.
    ((2, 8, 2), {}, Sharding.EXPERTS, 6),
    ((8, 4, 8), {}, Sharding.ROWS, 2),
    ((1, 4, 1), {}, Sharding.ROWS, 4),
    # With an expert at home one replica slot balances all loads; 17 slots of rows are fastest, and
    # save less than a hundredth.
    ((8, 8, 8), {"sharding": "experts"}, Sharding.EXPERTS, 2),
    ((16, 64, 4), {"sharding": "rows"}, Sharding.ROWS, 5),
]


@pytest.mark.parametrize(("shape", "given_", "sharding", "capacity"), SHARDINGS)
def test_auto_takes_homes_where_they_fit(
    shape: tuple[int, int, int], given_: dict[str, Any], sharding: Sharding, capacity: int
) -> None:
    costs = make_costs(hidden=1024, ffn=4096)
    choice, _ = choose_geometry(FSEPConfig(**given_), shape, 1, 2, priced_as(costs, 16384))
    assert (choice.geometry.sharding, choice.geometry.capacity) == (sharding, capacity)


SLOW_BETWEEN_NODES = make_costs(
    hidden=2048, ffn=1024, intra=Link(2e11, 1e-5), inter=Link(2e10, 1e-5), points=((1, 3e14),)
)


def test_auto_takes_the_faster_sharding_and_slots_that_pay() -> None:
    """Slow links between nodes: with many tokens, locality is worth more than weights."""
    shape, found = (16, 64, 4), {}
    for tokens in (1024, 2**20):
        for given_ in ({}, {"capacity": 5}):
            choice, best = choose_geometry(
                FSEPConfig(**given_), shape, 1, 2, priced_as(SLOW_BETWEEN_NODES, tokens)
            )
            assert [candidate.geometry.sharding for candidate in best] == ["experts", "rows"]
            assert str(choice) in map(str, best) and "slots: " in str(choice)
            faster = min(best, key=lambda candidate: candidate.seconds)
            assert choice.seconds <= faster.seconds * 1.011
            found[tokens, "capacity" in given_] = choice.geometry
    assert found[2**20, False].capacity > 5, "a further slot brings tokens back to their node"
    assert found[1024, False] == found[1024, True], "and does not pay for few tokens"
    assert found[1024, True].sharding == Sharding.EXPERTS
    assert found[2**20, True].sharding == Sharding.ROWS


def test_rows_take_slots_that_keep_tokens_on_their_node() -> None:
    """With 17 slots a node has every expert; on one node the fewest slots balance."""

    def slots(shape: tuple[int, int, int], tokens: int) -> int:
        choice, best = choose_geometry(
            FSEPConfig(sharding="rows"), shape, 1, 2, priced_as(SLOW_BETWEEN_NODES, tokens)
        )
        assert choice.geometry.sharding == Sharding.ROWS and not best
        return choice.geometry.capacity

    assert slots((16, 64, 4), 65536) >= 11
    assert slots((16, 64, 4), 1024) == slots((16, 64, 16), 65536) == 5


# Model's hidden size and FFN; N, E, ranks per node; slots.
MODELS = [
    # Where half of the ranks have no tokens, each takes eight experts of another.
    (2048, 768, (8, 128, 8), 24),
    # Weights and gradients of seven further experts would take 19 GiB of the card.
    (7168, 16384, (8, 128, 8), 17),
]


@pytest.mark.parametrize(("hidden", "ffn", "shape", "capacity"), MODELS)
def test_slots_serve_hot_experts_that_share_a_home(
    hidden: int, ffn: int, shape: tuple[int, int, int], capacity: int
) -> None:
    costs = CostModel(load_cluster("h100-8"), hidden, ffn, gated=True, bytes_per_element=2)
    choice, _ = choose_geometry(FSEPConfig(), shape, 1, 8, priced_as(costs, 8 * 8192))
    assert (choice.geometry.sharding, choice.geometry.capacity) == (Sharding.EXPERTS, capacity)
    fewer = replace(choice.geometry, capacity=17)
    hot_NE = skewed_counts_NE(fewer, 8, 8 * 8192)[1]
    seconds = [
        planned_seconds(FSEPConfig(), geometry, priced_as(costs, 8 * 8192)(geometry), hot_NE)
        for geometry in (choice.geometry, fewer)
    ]
    assert (seconds[0] < 0.7 * seconds[1]) == (capacity > 17)


@pytest.mark.parametrize(("tokens", "gains"), [(16384, True), (16, False)])
def test_training_expects_a_gain_where_ranks_would_wait(tokens: int, gains: bool) -> None:
    """Qwen3-30B-A3B on one node: with few tokens, gate and host take longer than the wait."""
    costs = CostModel(load_cluster("h100-8"), 2048, 768, gated=True, bytes_per_element=2)
    choice, _ = choose_geometry(FSEPConfig(), (8, 128, 8), 1, 8, priced_as(costs, 8 * tokens))
    found = expected_gain(FSEPConfig(), choice.geometry, choice.costs)
    assert found is not None
    low, high = found.factors
    assert low < 1.0 and (high > 1.05) == gains
    assert ("no gain" in str(found)) != gains
    assert expected_gain(FSEPConfig(), Geometry(4, 6, 3, 4), costs) is None, "stock cannot run"
    host = costs.cluster.host
    assert host is not None
    slow = replace(costs.cluster, host=replace(host, gate=SolveTime(1.0, 0.0, 0.0)))
    late = expected_gain(FSEPConfig(), choice.geometry, replace(choice.costs, cluster=slow))
    assert late is not None and late.stock_ms == found.stock_ms, "stock decides nothing"


def test_contention_prices_hidden_exchanges() -> None:
    costs, geometry = make_costs(), Geometry(8, 8, 2, 8)
    assert costs.hidden_share(geometry) == 0.125, "nothing was measured"
    for gemm, exchange, share in ((1.5, 1.2, 0.4), (1.01, 1.0, 0.125), (4.0, 4.0, 1.0)):
        cluster = replace(costs.cluster, contention=Contention(gemm, exchange))
        assert replace(costs, cluster=cluster).hidden_share(geometry) == pytest.approx(share)


def test_an_exchange_that_compute_hides_delays_the_tokens_of_the_layer() -> None:
    """Even counts: tokens take a layer's time without latency and experts, attention as theirs."""
    costs = make_costs(points=((1, 1e12),), pairs_per_rank=4096)
    even_NE, stock = np.full((8, 16), 256), stock_placement(8, 16, 2)
    layer_s = costs.layer_seconds(even_NE, stock)
    layer_s -= costs.token_passes * costs.token_latency_seconds(stock.geometry)
    unit_s = float(costs.gemm.unit_seconds(np.array([2048]))[0])
    experts_s = costs._expert_flops * 2 * unit_s
    assert layer_s > experts_s
    tokens_s, nodes = layer_s - experts_s, Geometry(8, 16, 3, 2)
    for kind, of_tokens in ((Kind.DELAYED, tokens_s + 2 * experts_s), (Kind.PARTS, 2 * experts_s)):
        share = 0.125 + tokens_s / of_tokens
        assert replace(costs, kinds={kind}).hidden_share(nodes) == pytest.approx(share)
    assert replace(costs, kinds={Kind.STEP}).hidden_share(nodes) == 0.0
    assert costs.hidden_share(Geometry(8, 16, 3, 8)) == 0.125, "inside a node nothing is added"
