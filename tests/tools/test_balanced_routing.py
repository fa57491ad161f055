"""`simulate` on balanced routing, where FSEP has nothing to gain."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megatron_laer.planner.cluster_files import cluster_text, load_cluster
from megatron_laer.tools import cli

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS, CLUSTERS = (
    sorted(file.stem for file in (CONFIGS / kind).glob("*.yaml")) for kind in ("models", "clusters")
)
RANKS = (8, 32)
DAILY = {
    ("mixtral-8x7b-e16k4", "h100-8", 32),
    ("tiny-moe", "a100-4x8-ib800", 32),
    ("tiny-qwen3", "cpu-gloo", 8),
}
CASES = [
    pytest.param(*case, marks=() if case in DAILY else pytest.mark.nightly)
    for case in product(MODELS, CLUSTERS, RANKS)
]


@pytest.mark.parametrize(("model", "cluster", "ranks"), CASES)
def test_no_advice_to_use_fsep(model, cluster, ranks, tmp_path, capsys):
    path = tmp_path / "without-limit.yaml"
    path.write_text(cluster_text(replace(load_cluster(cluster), card=None)))
    words = f"simulate --workload W0 --model {model} --cluster {path} --ranks {ranks}"
    words += " --method stock fsep --microbatches 2 --steps 1"
    assert cli.main(words.split()) == 0
    advice = capsys.readouterr().out.splitlines()[0]
    assert advice.startswith("Take stock EP"), advice
