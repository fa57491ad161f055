"""`plan --homes`: homes by pairs where they save rows, stock's elsewhere, and a file to train with.

Legend: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import gzip
import json
from itertools import combinations
from unittest import mock

import numpy as np
import pytest

from benchmarks import recorded_sets
from megatron_laer.planner import coactivation
from megatron_laer.planner.homes_file import read_homes
from megatron_laer.telemetry.trace_file import TraceWriter
from megatron_laer.tools import cli
from megatron_laer.tools.simulator import homes as homes_of_pairs
from megatron_laer.tools.simulator.homes import rows_of_sets
from tests.traces import pairs_of

# Experts that tokens choose two of: nodes of four, in stock's order and mixed.
IN_ORDER, MIXED = ([0, 1, 2, 3], [4, 5, 6, 7]), ([0, 2, 4, 6], [1, 3, 5, 7])
STEPS = 4


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(coactivation, "_STEPS", 60)


def chosen(groups, more_of_first=1):
    """Return experts of tokens that choose all pairs in a group alike."""
    first, second = (np.array(list(combinations(group, 2))) for group in groups)
    return np.concatenate([np.tile(first, (200 + more_of_first, 1)), np.tile(second, (200, 1))])


def recorded(path, of_layers, *, ranks=2, sets=False, first_layer=1):
    """Record, for each layer, the same tokens in all steps, or those of a list in each step."""
    names = [f"layer {first_layer + at}" for at in range(len(of_layers))]
    writer = TraceWriter(path, ranks, 8, names)
    for number in range(STEPS):
        step = number * 10**12  # recorded again late
        for layer, tokens in enumerate(of_layers):
            expert_TK = tokens[number] if isinstance(tokens, list) else tokens
            pairs_EE = pairs_of(expert_TK, 8)
            writer.append(step, layer, 0, np.tile(pairs_EE.diagonal(), (ranks, 1)))
            writer.append_pairs(step, layer, ranks * pairs_EE)
            if sets:
                sets_TE = np.zeros((len(expert_TK), 8), dtype=np.bool_)
                np.put_along_axis(sets_TE, expert_TK, True, axis=1)
                writer.append_sets(step, layer, sets_TE)
    writer.close()
    return path


def plan(trace, *words, capsys):
    """Return the status, the printed texts, and rows of the table by layer, as in JSON."""
    output = trace.parent / "plan.json"
    words = [str(word) for word in (trace, *words, "--json", output)]
    status = cli.main(["plan", *words])
    rows = json.loads(output.read_text())["homes"] if status == 0 else []
    return status, *capsys.readouterr(), {row["layer"]: row for row in rows}


@pytest.mark.parametrize("sets", [False, True], ids=["pairs", "sets"])
def test_experts_chosen_together_get_a_node_and_good_homes_stay(tmp_path, capsys, sets):
    trace = recorded(tmp_path / "group-0.trace", [chosen(MIXED), chosen(IN_ORDER)], sets=sets)
    homes = tmp_path / "homes.json"
    status, out, err, rows = plan(trace, "--node-size", 1, "--homes", homes, capsys=capsys)
    assert (status, err) == (0, "")
    written = read_homes(homes)
    written.check_fits(2, 8)
    nodes = written.by_layer["layer 1"].expert_E.reshape(2, 4)
    assert {frozenset(node) for node in nodes.tolist()} == {*map(frozenset, MIXED)}
    assert written.by_layer["layer 2"].is_stock
    moved, kept = rows["layer 1"], rows["layer 2"]
    assert (moved["homes"], kept["homes"]) == ("by pairs", "stock's: no rows saved")
    # Every token needs one node of two; in stock's order two of three pairs need both.
    assert moved["rows"] == pytest.approx(0.5, rel=1e-6 if sets else 0.05)
    assert moved["stock_rows"] == pytest.approx(0.5 * (1 + 2 / 3), rel=1e-6 if sets else 0.1)
    assert kept["saved"] == 0 and kept["max_over_mean"] == kept["stock_max_over_mean"]
    assert ("counted on" in out) == sets and "layer 1" in out


def test_the_later_half_of_the_steps_counts(tmp_path, capsys):
    """Experts that were together in the first half alone stay at stock's homes."""
    tokens = [chosen(MIXED)] * 2 + [chosen(IN_ORDER)] * 2
    trace = recorded(tmp_path / "group-0.trace", [tokens, tokens[::-1]])
    *_, rows = plan(trace, "--node-size", 1, "--homes", tmp_path / "homes.json", capsys=capsys)
    assert [row["homes"] for row in rows.values()] == ["stock's: no rows saved"] * 2


def test_a_heavier_rank_keeps_stocks_homes(tmp_path, capsys):
    trace = recorded(tmp_path / "group-0.trace", [chosen(MIXED, more_of_first=8)])
    words = (trace, "--node-size", 1, "--homes", tmp_path / "homes.json")
    with mock.patch.object(homes_of_pairs, "place_together", return_value=np.concatenate(MIXED)):
        *_, rows = plan(*words, capsys=capsys)
        assert rows["layer 1"]["homes"] == "by pairs"
        assert rows["layer 1"]["max_over_mean"] == pytest.approx(208 / 204)
        *_, rows = plan(*words, "--tolerance", 0.01, capsys=capsys)
    assert rows["layer 1"]["homes"] == "stock's: a heavier rank"
    assert rows["layer 1"]["max_over_mean"] == pytest.approx(1)
    assert read_homes(tmp_path / "homes.json").by_layer["layer 1"].is_stock


def test_layers_of_other_traces_stay_in_the_file(tmp_path, capsys):
    homes, words = tmp_path / "homes.json", ("--node-size", 1, "--homes", tmp_path / "homes.json")
    plan(recorded(tmp_path / "group-0.trace", [chosen(MIXED)]), *words, capsys=capsys)
    first = read_homes(homes).by_layer["layer 1"].expert_E.tolist()
    other = recorded(tmp_path / "group-1.trace", [chosen(IN_ORDER)], first_layer=2)
    assert plan(other, *words, capsys=capsys)[0] == 0
    found = read_homes(homes).by_layer
    assert found["layer 1"].expert_E.tolist() == first and found["layer 2"].is_stock
    before = homes.read_bytes()
    status, _, err, _ = plan(other, *words, "--ranks", 4, capsys=capsys)
    assert status == 2 and "has homes for 2 ranks and 8 experts, but this run has 4 ranks" in err
    assert homes.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--node-size 2", "all 2 ranks are in one node, and no rows between nodes can be saved"),
        ("--node-size 1 --ranks 16", "8 experts cannot be at home on 16 ranks"),
        ("--node-size 1 --sharding rows", "experts have no home with --sharding rows"),
        ("--node-size 1 --capacity 5", "--capacity 5: no effect here"),
    ],
)
def test_homes_that_cannot_be_made_are_refused(tmp_path, capsys, words, says):
    trace, homes = recorded(tmp_path / "group-0.trace", [chosen(MIXED)]), tmp_path / "homes.json"
    status, _, err, _ = plan(trace, *words.split(), "--homes", homes, capsys=capsys)
    assert status == 2 and says in err and not homes.exists()


def test_a_file_of_sets_is_counted_token_by_token(tmp_path, capsys):
    tokens = np.random.default_rng(0).permutation(chosen(MIXED))
    text = "".join(" ".join(map(str, experts)) + "\n" for experts in tokens.tolist())
    (tmp_path / "layer 7.E8.k2.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert recorded_sets.main([str(tmp_path), str(tmp_path / "out")]) == 0
    words = ("--ranks", 4, "--node-size", 2, "--homes", tmp_path / "homes.json")
    path = tmp_path / "out" / "layer 7.trace"
    status, out, _, rows = plan(path, *words, capsys=capsys)
    assert status == 0 and "counted on tokens' experts" in out
    assert rows["layer 7"]["rows"] == pytest.approx(0.5) and rows["layer 7"]["homes"] == "by pairs"


def test_rows_are_nodes_that_a_token_needs_less_its_own_by_chance():
    sets_TE = np.array([[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]], dtype=np.bool_)
    hosts_ME = np.eye(4, dtype=np.bool_).repeat(2, axis=1)
    assert rows_of_sets(sets_TE, hosts_ME) == pytest.approx(0.75 * (1 + 4) / 2)
