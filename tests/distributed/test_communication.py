"""The benchmark of bytes counts what real collectives move on 8 ranks, and finds its formulas."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import communication


def test_counts_equal_formulas_and_nodes_halve_what_crosses(tmp_path: Path) -> None:
    path = tmp_path / "communication.json"
    assert communication.main(["--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    inter = {
        (row["what"], row["node_size"], row["algorithm"]): row["inter_node_bytes"] for row in rows
    }
    assert {row["ranks"] for row in rows} == {8}
    for what in ("restore", "gradients"):
        for node_size in (8, 4, 2, 1):
            flat, node = inter[what, node_size, "flat"], inter[what, node_size, "node"]
            assert node <= flat and (flat == 0) == (node_size == 8)
        # E = 4 on 2 nodes of 4 ranks with 2 slots: each node holds each expert twice.
        assert 0 < 2 * inter[what, 4, "node"] <= inter[what, 4, "flat"]
