"""`simulate`: its output, files and refusals."""

from __future__ import annotations

import json
from unittest import mock

import pytest

from megatron_laer.telemetry.trace_events import TRACKS
from megatron_laer.tools import cli
from megatron_laer.tools.simulator.iteration.clocks import COMPUTE, EXPOSED
from megatron_laer.tools.simulator.iteration.methods import METHODS
from tests.unit.plan_cases import drifting_trace, recording


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return recording(tmp_path_factory.mktemp("trace") / "x.trace", drifting_trace())


def run(*words, capsys):
    try:
        status = cli.main(["simulate", *map(str, words)])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


TINY = "--model mixtral-8x7b-e8k2 --node-size 2".split()


def test_experts_at_home_without_replicas_exchange_no_weights(tmp_path, path, capsys):
    words = ("--mode", "forecast", "--method", "stock", "laer", "fsep", "--json", tmp_path / "x")
    found = {}
    for sharding in ("rows", "experts"):
        more = ("--sharding", sharding, "--strategy", "static")
        status, _, err = run(path, *TINY, *words, *more, capsys=capsys)
        assert status == 0, err
        written = json.loads((tmp_path / "x").read_text())
        assert written["sharding"] == sharding
        found[sharding] = written["methods"]
    rows, home = found["rows"], found["experts"]
    # The others do not know the sharding.
    assert (home["stock"], home["laer"]) == (rows["stock"], rows["laer"])
    assert home["fsep"]["bytes"] == home["stock"]["bytes"] != rows["fsep"]["bytes"]
    assert home["fsep"]["exposed_s"]["restore"] == 0 < rows["fsep"]["exposed_s"]["restore"]
    restored = [of["fsep"]["memory_bytes"]["restored_experts"] for of in (rows, home)]
    # Of three slots, one has no home expert.
    assert restored[0] == pytest.approx(3 * restored[1])


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
        ("--node-size 3", "node size 3 does not divide the 4 ranks; use one of [1, 2, 4]"),
        ("--model mixtral-8x7b-e16k4", "has 8 experts, not 16"),
        ("--experts 0", "--experts: '0' is no integer"),
        ("--ranks 4 --world 6", "--world 6 is no multiple of --ranks 4"),
        ("--recompute some", "--recompute: invalid choice: 'some'"),
        ("--png x.svg", "--png 'x.svg': give a file that ends in .png"),
        ("--timeline nowhere/x.json", "--timeline 'nowhere/x.json': the folder"),
        ("--hours 1e-6 --microbatches 4096", "stopped after the 1e-06 hours of --hours"),
    ],
)
def test_bad_input_is_quoted_and_told_what_works(path, capsys, words, problem):
    status, out, err = run(path, *TINY, *words.split(), capsys=capsys)
    assert status == 2
    assert problem in err and err.startswith("megatron-laer simulate: ")
    assert out == "" and err.count("\n") == 1


def test_a_picture_without_matplotlib_is_refused_before_the_work(tmp_path, path, capsys):
    with mock.patch("importlib.util.find_spec", return_value=None):
        err = run(path, *TINY, "--png", tmp_path / "x.png", capsys=capsys)[2]
    assert "--png needs the package matplotlib" in err


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
