"""`calibrate` on gloo ranks: files that other commands read, and refusals that reach every rank."""

from __future__ import annotations

import argparse
import os
import subprocess
from typing import Any

import pytest

from megatron_laer.cpu.ranks import Raised, RankPool
from megatron_laer.files.shipped import yaml_file
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import CONSTANTS, Cluster
from tests.processes import finished

TINY = "--quick --config tiny-moe"


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_laer".split()
    return finished(*launcher, "calibrate", *words)


def grows(cluster: Cluster, kind: str) -> None:
    """Check that least times grow from the smallest to the largest, with room for noise."""
    found = [figure for name, figure in cluster.figures if name.startswith(kind)]
    assert len(found) == 3, kind
    assert found[-1].low > 0.5 * found[0].low > 0, kind


def test_two_ranks_write_a_file_that_plan_takes_and_keep_what_is_there(tmp_path):
    output = tmp_path / "mine.yaml"
    done = torchrun(str(output), "--quick")
    assert done.returncode == 0, done.stderr
    assert "figures of 2 x " in done.stdout and done.stdout.count("mine.yaml") == 1
    cluster = load_cluster(output)
    assert (cluster.name, cluster.nodes, cluster.ranks_per_node) == ("mine", 1, 2)
    assert {back_end.name for back_end in cluster.back_ends} >= {"loop"}
    for back_end in cluster.back_ends:
        for product in ("forward", "input_grad", "weight_grad"):
            grows(cluster, f"{back_end.name} {product},")
    grows(cluster, "All-to-All intra, peers 1,")
    assert not any(name.startswith("All-to-All inter") for name, _ in cluster.figures)
    assert all(figure.low <= figure.median <= figure.high for _, figure in cluster.figures)
    measured = dict(cluster.measured)
    assert {"hardware", "date", "torch", "CUDA", "NCCL"} <= measured.keys()
    # Latency by peer is a constant of a fit, the host's time of replicas shows in training alone,
    # and all others are known to a range.
    without = {"intra.peer_s", "inter.peer_s", "host.replicas_s"}
    assert {name for name, _ in cluster.spreads} == set(CONSTANTS) - without

    plan = "plan --workload W6 --ranks 4 --node-size 2 --config tiny-moe --strategy greedy"
    planned = finished("-m", "megatron_laer", *plan.split(), "--cluster", output)
    assert planned.returncode == 0, planned.stderr
    assert "in nodes of 2: " in planned.stdout and " on mine" in planned.stdout

    before = output.read_bytes()
    refused = torchrun(str(output), "--quick")
    assert refused.returncode != 0
    assert refused.stderr.count("is there already; give another file, or --force") == 2
    assert output.read_bytes() == before


@pytest.mark.nightly
def test_calibration_runs_on_the_labelled_device(tmp_path):
    output = tmp_path / "card.yaml"
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    words = f"{launcher} -m tests.fake_cuda.program megatron_laer calibrate {output} {TINY}"
    done = finished(*words.split())
    assert done.returncode == 0, done.stderr[-4000:]
    measured = dict(load_cluster(output).measured)
    assert "H100" in measured["hardware"] and "bfloat16" in measured["expert"]


def calibrated(words: str, rank_words: str = "", rank: int = -1) -> None:
    from megatron_laer.tools.cli import calibrate

    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    own = f"{words} {rank_words}" if os.environ["RANK"] == str(rank) else words
    assert calibrate.run(parser.parse_args(own.split())) == 0


def refusal(pool: RankPool, *args: Any) -> str:
    raised = pool.run_raw(calibrated, *args)
    assert all(isinstance(result, Raised) for result in raised), raised
    assert {result.type_name for result in raised} == {"ValueError"}
    (message,) = {result.message for result in raised}
    return str(message)


def test_both_kinds_of_links_are_measured_and_a_file_is_replaced_by_force(ranks, tmp_path):
    output = tmp_path / "four.yml"
    output.write_text("something else")
    ranks(4).run(calibrated, f"{output} {TINY} --node-size 2 --force")
    cluster = load_cluster(output)
    assert (cluster.name, cluster.nodes, cluster.ranks_per_node) == ("four", 2, 2)
    assert cluster.assumed == "nothing"
    grows(cluster, "All-to-All intra, peers 1,")
    grows(cluster, "All-to-All inter, peers 1,")
    spreads = dict(cluster.spreads)
    assert {"intra.bytes_per_s", "inter.bytes_per_s", "inter.latency_s"} <= spreads.keys()
    assert "hidden 128, ffn 128, gated" in dict(cluster.measured)["expert"]


def test_bad_input_is_the_same_sentence_on_every_rank(ranks, tmp_path):
    pool, good = ranks(2), f"{tmp_path / 'x.yaml'} {TINY}"
    (tmp_path / "there.yaml").write_text("mine")
    model = tmp_path / "model.yaml"
    content = yaml_file("model", "tiny-moe").read_text()
    model.write_text(content)
    huge = tmp_path / "huge.yaml"
    huge.write_text(content.replace("hidden-size: 128", "hidden-size: 1048576"))
    for words, message in (
        (f"{tmp_path / 'there.yaml'} {TINY}", "is there already; give another file, or --force"),
        (f"{good} --node-size 3", "nodes of 3 ranks do not divide the 2 ranks; give --node-size"),
        (f"{model} --config {model} --force", "would write over the input"),
        (f"{tmp_path / 'x.yaml'} --config {huge}", "GiB of a rank's memory"),
    ):
        assert message in refusal(pool, words)
    assert refusal(pool, good, "--config moon", 1).startswith("rank 1: --config 'moon'")
    differing = refusal(pool, good, "--node-size 1", 1)
    assert "ranks 0 and 1 would measure differently (node_size is 2 and 1); start all" in differing
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("huge.yaml", "model.yaml", "there.yaml")
    ]
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_a_rank_beyond_its_world_is_refused(tmp_path):
    environment = {"RANK": "2", "WORLD_SIZE": "2"}
    done = finished("-m", "megatron_laer", "calibrate", tmp_path / "x.yaml", **environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "RANK=2 with WORLD_SIZE=2: must be 0 to 1" in done.stderr
