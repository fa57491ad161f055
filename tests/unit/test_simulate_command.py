"""`simulate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from megatron_laer.config import PlanMode
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.telemetry.trace_events import TRACKS
from megatron_laer.telemetry.trace_records import Trace
from megatron_laer.tools import cli
from megatron_laer.tools.simulator.iteration.clocks import COMPUTE, EXPOSED
from megatron_laer.tools.simulator.iteration.estimate import Work, check_fits
from megatron_laer.tools.simulator.iteration.methods import METHODS, Settings, make_method
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.iteration.predict import predict
from megatron_laer.tools.simulator.iteration.rates import Rates, rate_sets
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.traces.workloads import Shape, workload_counts
from tests.unit.plan_cases import drifting_trace, recording


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return recording(tmp_path_factory.mktemp("trace") / "x.trace", drifting_trace())


def run(*words, capsys):
    try:
        status = cli.main(["simulate", *map(str, words)])
    except SystemExit as stopped:  # by argparse
        status = stopped.code
    return status, *capsys.readouterr()


TINY = "--model mixtral-8x7b-e8k2 --node-size 2".split()


def test_the_command_prints_writes_and_draws(tmp_path, path, capsys):
    pytest.importorskip("matplotlib")
    json_file, png, timeline = (tmp_path / name for name in ("x.json", "x.png", "t.json"))
    files = ["--json", json_file, "--png", png, "--timeline", timeline]
    status, out, err = run(path, *TINY, *files, capsys=capsys)
    assert status == 0, err
    assert "N=4 G=2 C=3 adaptive T=2048: 2048 tokens per rank and microbatch, 3 microbatches" in out
    assert png.read_bytes().startswith(b"\x89PNG")

    written = json.loads(json_file.read_text())
    assert written["advice"] == out.splitlines()[-1]
    assert written["advice"].startswith(("Use FSEP", "Do not use FSEP here", "Undecided"))
    assert list(written["methods"]) == list(METHODS)
    for method in written["methods"].values():
        seconds = method["iteration_s"]
        assert seconds["low"] < seconds["value"] < seconds["high"]
        assert set(method["exposed_s"]) == set(EXPOSED)
        assert set(method["compute_s"]) == set(COMPUTE)
        parts = [*method["exposed_s"].values(), *method["compute_s"].values(), method["waiting_s"]]
        assert sum(parts) == pytest.approx(seconds["value"])
        assert set(method["bytes"]) == {"intra", "inter"}
        assert method["peak_bytes"] == pytest.approx(sum(method["memory_bytes"].values()))
        assert method["tokens_per_s"] == pytest.approx(4 * 2048 * 3 / seconds["value"])
        assert method["naive_s"] > 0 and 0 < method["mfu"] < 1
    assert written["cases"][0]["methods"] == written["methods"]

    events = json.loads(timeline.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert "fsep, stage 0, rank 3 of the group" in names and len(names) == 4 * len(METHODS)
    bars = [event for event in events if event["ph"] == "X"]
    assert {bar["cat"] for bar in bars} == set(TRACKS)
    assert {"restore layer 2", "reduce layer 2", "dispatch layer 2", "step 1"} <= {
        bar["name"] for bar in bars
    }
    last_us = max(bar["ts"] + bar["dur"] for bar in bars)
    slowest = max(method["iteration_s"]["value"] for method in written["methods"].values())
    # The timeline shows one step, the figures are means of three.
    assert last_us == pytest.approx(1e6 * slowest, rel=0.5)


def test_several_values_are_a_sweep(tmp_path, path, capsys):
    words = "--ranks 4 8 --capacity 2 3 --mode forecast exact --method stock fsep --steps 1"
    words += " --tokens 32768"
    status, out, err = run(path, *TINY, *words.split(), "--json", tmp_path / "x", capsys=capsys)
    assert status == 0, err
    cases = json.loads((tmp_path / "x").read_text())["cases"]
    assert {(case["tokens"], case["world"] // case["ranks"]) for case in cases} == {(32768, 1)}
    found = [(case["ranks"], case["capacity"], case["mode"]) for case in cases]
    assert found == [
        (ranks, capacity, mode)
        for ranks in (4, 8)
        for capacity in (2, 3)
        for mode in ("forecast", "exact")
    ]
    assert "N=8 C=3 exact  " in out and "Use FSEP (with N=" in out


def test_balanced_routing_is_advised_against(capsys):
    words = "--workload W0 --ranks 8 --model mixtral-8x7b-e8k2 --tokens 512 --steps 1"
    status, out, err = run(*words.split(), capsys=capsys)
    assert status == 0, err
    assert "Do not use FSEP here" in out.splitlines()[-1]
    assert "restore costs" in out.splitlines()[-1]


def test_what_does_not_fit_into_memory_is_not_advised(path, capsys):
    words = "--tokens 32768 --steps 1 --method stock fsep --memory-gib"
    status, out, err = run(path, *TINY, *words.split(), 1, capsys=capsys)
    assert status == 0, err
    assert out.splitlines()[-1].startswith("Do not use FSEP here: it needs ")
    status, out, err = run(path, *TINY, *words.split(), 10000, capsys=capsys)
    assert "Use FSEP (C = 3" in out.splitlines()[-1]


def test_a_method_that_cannot_run_is_left_out_and_said(capsys):
    words = "--workload W0 --ranks 8 --model mixtral-8x7b-e8k2 --experts 9 --steps 1 --tokens 64"
    status, out, err = run(*words.split(), capsys=capsys)
    assert status == 0, err
    assert "no fsdp+ep: FSDP+EP needs E/C groups of ranks" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--ranks 3 --node-size 3", "cannot be planned for 3 ranks; use one of [1, 2, 4]"),
        ("--ranks 4 4", "--ranks names 4 twice; leave one out"),
        ("--node-size 3", "node size 3 does not divide the 4 ranks; use one of [1, 2, 4]"),
        ("--capacity 1", "must hold each of 8 experts, and a rank none twice; use 2 to 8"),
        ("--model moon", "--model 'moon': unknown model 'moon'"),
        ("--cluster moon", "--cluster 'moon': unknown cluster 'moon'"),
        ("--model mixtral-8x7b-e16k4", "has 8 experts, not 16"),
        ("--experts 0", "--experts: '0' is no integer"),
        ("--mode announced", "--mode: invalid choice: 'announced'"),
        ("--method eplb", "--method: invalid choice: 'eplb'"),
        ("--restore step", "--restore step keeps layouts over a step, got --mode adaptive"),
        ("--virtual-pipeline 2", "interleaved schedule needs a pipeline"),
        ("--pipeline 33", "32 layers are too few for 33 stages"),
        ("--pipeline 2 --virtual-pipeline 2", "3 microbatches on 2 stages of 2 chunks"),
        ("--world 6", "--world 6 is no multiple of the trace's 4 ranks"),
        ("--ranks 4 --world 6", "--world 6 is no multiple of --ranks 4"),
        ("--world 8 --expert-data-parallel 2", "say the same; leave one out"),
        ("--tensor-parallel 3", "3 tensor-parallel ranks do not divide the 4"),
        ("--stock-expert-parallel 3", "stock expert parallelism of size 3: it must divide 4"),
        ("--lag 6", "the trace holds 6 step(s), and a forecast is 6 step(s) old"),
        ("--recompute some", "--recompute: invalid choice: 'some'"),
        ("--workload W1", "and --workload W1; leave one out"),
        ("--png x.svg", "--png 'x.svg': give a file that ends in .png"),
        ("--json /", "--json '/': it is there and no regular file"),
        ("--timeline nowhere/x.json", "--timeline 'nowhere/x.json': the folder"),
        ("--peak-tflops 0", "--peak-tflops: '0' is no number"),
    ],
)
def test_bad_input_is_quoted_and_told_what_works(path, capsys, words, problem):
    status, out, err = run(path, *TINY, *words.split(), capsys=capsys)
    assert status == 2
    assert problem in err and err.startswith("megatron-laer simulate: ")
    assert out == "" and err.count("\n") == 1


def test_outputs_are_not_one_file_and_no_input(tmp_path, path, capsys):
    same = ["--json", tmp_path / "x", "--timeline", tmp_path / "x"]
    assert "--json and --timeline are one file" in run(path, *TINY, *same, capsys=capsys)[2]
    assert "--json" in run(path, *TINY, "--json", path, capsys=capsys)[2]
    with mock.patch("importlib.util.find_spec", return_value=None):
        err = run(path, *TINY, "--png", tmp_path / "x.png", capsys=capsys)[2]
    assert "--png needs the package matplotlib" in err


def test_a_pipeline_that_does_not_fit_into_memory_is_refused(path, capsys):
    words = "--pipeline 32 --microbatches 4096 --method stock".split()
    with mock.patch("megatron_laer.files.memory.available_bytes", return_value=2**24):
        status, out, err = run(path, *TINY, *words, capsys=capsys)
    assert (status, out) == (2, "")
    assert "4096 microbatches on 32 stages of 4 ranks would take about" in err


WORK = Work(
    geometry=Geometry(64, 8, 2, 8),
    methods=METHODS,
    strategy="greedy",
    mode=PlanMode.ADAPTIVE,
    rates=5,
    layers=32,
    traced_layers=4,
    microbatches=8,
    stages=1,
    chunks=1,
    steps=3,
    records=32,
    cases=4,
    lag=1,
    draws=False,
    timeline=False,
)


@pytest.mark.parametrize(
    "more",
    [
        {"geometry": Geometry(128, 8, 2, 8)},
        {"geometry": Geometry(64, 16, 2, 8)},
        {"rates": 6},
        {"layers": 33},
        {"microbatches": 9},
        {"stages": 2},
        {"steps": 4},
        {"records": 33},
        {"cases": 5},
        {"draws": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_of_anything_is_estimated_to_take_longer(more):
    assert replace(WORK, **more).seconds > WORK.seconds
    for method in METHODS:
        only = replace(WORK, methods=[method])
        assert 0 < replace(only, **more).seconds - only.seconds < WORK.seconds * 3


def test_what_would_take_too_long_is_refused_with_what_would_do():
    hours = WORK.seconds / 3600
    check_fits([WORK], hours * 1.01)
    with pytest.raises(ValueError, match=r"simulating 2 case\(s\) of up to 64 ranks and 8 microb"):
        check_fits([WORK, WORK], hours * 1.01)


@pytest.mark.parametrize("ranks", [64, 4096])
def test_a_simulation_takes_no_more_memory_than_estimated(ranks, monkeypatch):
    """Of a trace with as many microbatches as are simulated, so that nothing is shared."""
    model = read_model("mixtral-8x7b-e8k2")
    cluster = load_cluster("a100-4x8-ib800")
    rates = rate_sets(Rates(cluster, model.bytes_per_element))
    work = replace(WORK, geometry=Geometry(ranks, 8, 2, 8), traced_layers=1, cases=8)
    costs = CostModel(cluster, model.hidden, model.expert_ffn, True, 2)
    settings = Settings(work.geometry, costs)
    methods = [make_method(name, settings, rates[0]) for name in METHODS]
    shape = Shape(ranks, 8, 2, 1024)
    counts_RNE = np.stack([workload_counts("W6", shape, step) for step in range(24)])
    step_R, microbatch_R = np.divmod(np.arange(24), 8)
    trace = Trace(("a",), step_R, 0 * step_R, microbatch_R, counts_RNE.astype(np.int32))
    run_shape = RunShape(ranks, 8, 1024, work.microbatches)
    tracemalloc.start()
    predict(Routing(trace, ranks), model, run_shape, methods, rates, steps=1)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of one process, whatever its size.
    assert peak_bytes < 2**22 + work.bytes


def test_the_hosts_gap_is_added_once(tmp_path, path, capsys):
    found = []
    for gap_ms in (0, 250):
        words = "--method stock --steps 1 --microbatches 2 --json".split()
        status, _, err = run(
            path, *TINY, "--host-gap-ms", gap_ms, *words, tmp_path / "x", capsys=capsys
        )
        assert status == 0, err
        found.append(json.loads((tmp_path / "x").read_text())["methods"]["stock"])
    before, after = found
    assert after["exposed_s"]["host"] - before["exposed_s"]["host"] == pytest.approx(0.25)
    assert after["iteration_s"]["value"] - before["iteration_s"]["value"] == pytest.approx(0.25)


def test_a_workload_needs_ranks_and_no_file(capsys):
    model = "--model mixtral-8x7b-e8k2".split()
    assert "nothing to simulate: give a TRACE" in run(*model, capsys=capsys)[2]
    assert "give --ranks" in run("--workload", "W1", *model, capsys=capsys)[2]
    words = "--workload W1 --ranks 4 --format csv".split()
    assert "--format csv: no effect here" in run(*words, *model, capsys=capsys)[2]
