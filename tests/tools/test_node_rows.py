"""Rows between nodes by cause: counts, and the same figures in all four tools.

Legend: N ranks, E experts, C slots, T tokens of a rank, K top-k, M nodes.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_laer.choices import TokenExchange
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.token_exchange import with_token_exchange
from megatron_laer.tools import cli
from megatron_laer.tools.cli.prediction_settings import prediction_settings
from megatron_laer.tools.report.what_if import what_if
from megatron_laer.tools.simulator.node_rows import NodeRows, by_cause, home_pairs
from tests.tools.plan_cases import drifting_trace, recording

GEOMETRY = Geometry(8, 32, 8, 2)
TOKENS, TOP_K = 2000, 4
RNG = np.random.default_rng(0)
SETS_NTK = np.array(
    [[RNG.choice(32, TOP_K, replace=False) for _ in range(TOKENS)] for _ in range(8)]
)
COUNTS_NE = np.stack([np.bincount(sets.ravel(), minlength=32) for sets in SETS_NTK])


def test_home_rows_are_those_of_one_copy_of_each_expert():
    node_NTK = np.arange(8)[:, None, None] // 2
    assert home_pairs(COUNTS_NE, 2) == int((node_NTK != SETS_NTK // 4 // 2).sum())
    assert home_pairs(COUNTS_NE, 8) == 0
    # Experts that ranks do not share equally keep their order.
    uneven_NE = np.ones((4, 6), dtype=np.int64)
    assert home_pairs(uneven_NE, 2) == 4 * 6 // 2


def rows_of(layout, exchange, geometry=GEOMETRY):
    costs = CostModel(load_cluster("h100-8"), 2048, 768, True, 2)
    prices = with_token_exchange(costs, exchange, geometry, TOP_K, TOKENS).tokens
    totals = exact_split(layout, geometry.node_size).totals(COUNTS_NE)
    return by_cause([NodeRows.of(COUNTS_NE, geometry.node_size, totals, prices)])


def test_causes_add_up_to_the_rows_that_independent_tokens_send():
    layout = construct_layout(COUNTS_NE, GEOMETRY.static_layout, GEOMETRY.node_size)
    by_rank, by_node = (rows_of(layout, exchange) for exchange in TokenExchange)
    for found in (by_rank, by_node):
        rest = found["home"] - found["replicas"] - found["shared"]
        assert found["sent"] == pytest.approx(rest)
    assert by_rank["home"] == pytest.approx(3 / 4, abs=0.01)
    assert by_rank["shared"] == 0 and by_rank["replicas"] == by_node["replicas"] > 0.2
    far = exact_split(layout, 2).totals(COUNTS_NE).far_S.sum()
    assert by_node["sent"] < by_rank["sent"] == far / COUNTS_NE.sum()


def test_one_copy_without_sharing_sends_what_home_does_and_sharing_is_counted():
    static = Geometry(8, 32, 4, 2)
    layout = static.static_layout
    by_rank, by_node = (rows_of(layout, exchange, static) for exchange in TokenExchange)
    assert by_rank["sent"] == by_rank["home"] and by_rank["replicas"] == 0
    nodes_NTK = SETS_NTK // 8
    different = sum(
        len({*nodes} - {rank // 2}) for rank, of in enumerate(nodes_NTK) for nodes in of.tolist()
    )
    counted = different / SETS_NTK.size
    assert 0.875 * counted < by_node["sent"] < counted  # as prices are, up to an eighth below


def test_all_four_tools_print_the_same_rows(tmp_path, capsys):
    trace = drifting_trace(ranks=4)
    path = recording(tmp_path / "x.trace", trace)
    out = tmp_path / "x.json"

    def written(*words):
        assert cli.main([*map(str, words), "--json", str(out)]) == 0
        return json.loads(out.read_text()), capsys.readouterr().out

    sizes = "--node-size 2 --capacity 3 --token-exchange node".split()
    plan = ["plan", path, *sizes, *"--ranks 4 --strategy static --mode forecast".split()]
    planned, printed = written(*plan)
    stock, static = (row["node_rows"] for row in planned["rows"])
    assert stock["home"] == static["home"] == stock["sent"] > 0
    assert f"{stock['home']:.1%} of pairs leave their node with one copy" in printed

    shared = "--model mixtral-8x7b-e8k2 --cluster h100-8".split()
    flags = "--sharding rows --strategy static --method stock fsep --steps 99"
    flags += " --stock-expert-parallel 4 --stock-dispatcher alltoall --mode forecast"
    simulated, text = written("simulate", path, *shared, *sizes, *flags.split())
    methods = simulated["methods"]
    assert methods["stock"]["node_rows"] == pytest.approx(stock)
    assert methods["fsep"]["node_rows"]["home"] == pytest.approx(static["home"])
    assert methods["fsep"]["node_rows"]["replicas"] == pytest.approx(static["replicas"])
    assert "rows between nodes shared" in text

    given = {"cluster": "h100-8", "config": None, "token_exchange": "node"}
    settings = prediction_settings(given, None, None)
    rows = what_if(str(path), trace, Geometry(4, 8, 3, 2), settings, 99)
    assert rows[0].row.node_rows == pytest.approx(stock)
