"""Layouts and quotas for several nodes together: prices, the choice, and rows that they save."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import domains as benchmark
from benchmarks.token_exchange import Shape
from megatron_laer.choices import Auto, Sharding, TokenExchange
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Link
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry, domains
from megatron_laer.planner.sharding_choice import Candidate, choose_geometry
from megatron_laer.planner.token_exchange import token_seconds, with_token_exchange
from tests.costs import make_costs

QWEN = CostModel(load_cluster("a100-4x8-ib800"), 4096, 1536, gated=True, bytes_per_element=2)
SHAPE = 32, 128, 8  # N, E, ranks per node


def chosen(tokens: int = 8192, **settings: Any) -> Candidate:
    config = FSEPConfig(**{"sharding": Sharding.ROWS, "token_exchange": "node"} | settings)

    def priced(geometry: Geometry) -> CostModel:
        exchange = TokenExchange(config.token_exchange)
        of_tokens = with_token_exchange(QWEN, exchange, geometry, 8, tokens)
        return of_tokens.with_exchange(Auto.AUTO, geometry)

    choice, _ = choose_geometry(config, SHAPE, 1, 8, priced)
    return choice


def test_a_domain_is_of_whole_nodes_and_moves_experts() -> None:
    assert Geometry(*SHAPE[:2], 8, 8, domain_nodes=2).domain_size == 16
    for nodes in (0, 3, 8):
        with pytest.raises(ValueError, match=rf"{nodes} does not divide the 4 nodes; .*\[1, 2, 4"):
            Geometry(*SHAPE[:2], 8, 8, domain_nodes=nodes)
    with pytest.raises(ValueError, match="experts at home are on their node; use --fsep-sharding"):
        Geometry(*SHAPE[:2], 8, 8, Sharding.EXPERTS, 2)


@pytest.mark.parametrize(
    ("capacity", "nodes"), [(5, [1, 4]), (8, [1, 2, 4]), (9, [1, 2]), (12, [1, 2]), (17, [1])]
)
def test_domains_that_hold_every_expert_are_compared(capacity: int, nodes: list[int]) -> None:
    """Of 16 ranks, 8 slots hold 128 experts, and 9 a replica for each rank as well."""
    geometry = Geometry(*SHAPE[:2], capacity, 8)
    assert [one.domain_nodes for one in domains(geometry)] == nodes
    at_home = replace(geometry, sharding=Sharding.EXPERTS)
    assert [one.domain_nodes for one in domains(at_home)] == [1]


@pytest.mark.parametrize("domain_nodes", [1, 2, 4])
@pytest.mark.parametrize("exchange", list(TokenExchange))
def test_a_layer_is_priced_by_the_links_that_its_rows_cross(
    exchange: TokenExchange, domain_nodes: int
) -> None:
    """With free compute and even counts, a layer costs its tokens' time for any domain."""
    geometry = Geometry(16, 64, 8, 4, domain_nodes=domain_nodes)
    costs = make_costs(
        points=((1, 1e30),), intra=Link(3e10, 1e-5), inter=Link(1e9, 2e-5), hidden=512
    )
    counts_NE = np.full((16, 64), 1024 * 8 // 64, dtype=np.int64)
    layout = construct_layout(counts_NE, geometry.static_layout, geometry.domain_size)
    totals = exact_split(layout, geometry.domain_size).totals(counts_NE)
    assert totals.far_S.any() == (domain_nodes < 4)
    priced = with_token_exchange(costs, exchange, geometry, 8, 1024)
    assert (priced.tokens.domain_rows > 0) == (domain_nodes > 1)
    layer_s = priced.layer_seconds(counts_NE, layout, 4, domain_nodes=domain_nodes)
    # A price is of the busiest rank, an exchange's time of the mean one.
    expected_s = token_seconds(costs, geometry, 8, 1024)[exchange]
    assert layer_s == pytest.approx(expected_s, rel=0.1)
    assert priced.least_layer_seconds(counts_NE, geometry) <= layer_s


def test_auto_takes_pairs_of_nodes_where_their_rows_are_worth_it() -> None:
    found = chosen(capacity=8)
    assert found.geometry.domain_nodes == 2 and "8 slots for 2 nodes" in str(found)
    for settings in (
        {"capacity": 17},  # a node has every expert
        {"capacity": 8, "tokens": 1024},  # weights outweigh rows
        {"capacity": 8, "domain_nodes": 1},
        {"capacity": 8, "token_exchange": "rank"},  # a row for each expert
    ):
        assert chosen(**settings).geometry.domain_nodes == 1
    assert chosen(capacity=8, tokens=1024, domain_nodes=4).geometry.domain_nodes == 4
    with pytest.raises(ValueError, match="--fsep-domain-nodes 3 does not divide the 4 nodes"):
        chosen(capacity=8, domain_nodes=3)


@pytest.mark.parametrize("routing", ["random", "skewed", "topics"])
def test_pairs_of_nodes_save_rows_at_the_same_balance(routing: str) -> None:
    """Of so few tokens; `python -m benchmarks.domains` has 4096 per rank."""
    shape = Shape(nodes=4, node_size=8, experts=128, topk=8, tokens=256)
    row = benchmark.row_of(shape, benchmark.topic_maps(shape, routing, seed=0), capacity=8)
    assert row["fresh: 2 nodes"] < 0.73 * row["fresh: 1 node"]
    assert row["planned: 2 nodes"] < 0.8 * row["planned: 1 node"]
    assert row["max/mean"] <= 1.01
