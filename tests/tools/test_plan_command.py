"""`plan`: its output, files and refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_laer.files.shipped import yaml_file
from megatron_laer.tools import cli
from megatron_laer.tools.simulator.comparison import STOCK
from tests.processes import python_path
from tests.tools.plan_cases import drifting_trace, recording

ROOT = Path(__file__).resolve().parents[2]
SHARED_NPZ = ROOT.parent / "shared" / "data" / "smartmoe_trace_dev.npz"


@pytest.fixture(scope="module")
def trace():
    return drifting_trace()


def run(*words, capsys):
    try:
        status = cli.main(["plan", *map(str, words)])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_the_command_prints_the_table_and_writes_the_figures(tmp_path, trace, capsys):
    path = recording(tmp_path / "group-0.trace", trace)
    words = "--ranks 8 --capacity 2 3 --node-size 4 --strategy greedy --mode forecast exact"
    status, out, err = run(path, *words.split(), "--json", tmp_path / "x.json", capsys=capsys)
    assert status == 0 and err == ""
    assert "6 steps, 2 layers, 36 records, 8 experts, 4 ranks" in out
    assert "planned for 8 ranks in nodes of 4 on a100-4x8-ib800" in out
    lines = [line.split() for line in out.splitlines()]
    assert [line[:3] for line in lines if line and line[0] == "greedy"] == [
        ["greedy", mode, capacity] for capacity in "23" for mode in ("forecast", "exact")
    ]
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["ranks"], written["recorded_ranks"], written["node_size"]) == (8, 4, 4)
    assert [row["capacity"] for row in written["rows"]] == [1, 2, 2, 3, 3]
    exact = next(row for row in written["rows"] if row["mode"] == "exact")
    assert exact["load_over_bound"] == 1.0 and "ratios_R" not in exact


def test_the_command_prices_the_token_exchange_that_is_asked_for(tmp_path, capsys):
    words = "--workload W0 --ranks 32 --experts 128 --topk 8 --steps 2 --strategy greedy"
    layer_ms = {}
    for exchange in ("rank", "node", "auto"):
        given = ("--mode", "forecast", "--json", tmp_path / "x.json", "--token-exchange", exchange)
        status, out, err = run(*words.split(), *given, capsys=capsys)
        assert status == 0 and err == ""
        written = json.loads((tmp_path / "x.json").read_text())
        priced, both_ms = written["token_exchange"], written["token_exchange_ms"]
        assert priced == ("node" if exchange == "auto" else exchange)
        assert f"tokens are priced as they travel by {priced}; expected" in out
        assert f"top-8 and C = 5: rank {both_ms['rank']:.3f} ms, node {both_ms['node']:.3f}" in out
        assert both_ms["node"] < both_ms["rank"]
        layer_ms[exchange] = [row["layer_ms"] for row in written["rows"]]
    # Stock, in the first row, always has Megatron's exchange.
    assert layer_ms["auto"] == layer_ms["node"] != layer_ms["rank"]
    assert layer_ms["node"][0] == layer_ms["rank"][0]
    assert layer_ms["node"][1] < layer_ms["rank"][1]


def test_the_command_prices_what_is_recomputed(tmp_path, capsys):
    words = "--workload W0 --ranks 32 --experts 128 --steps 2 --strategy static --mode forecast"
    exchanged_ms, layer_ms = {}, {}
    for recompute in ("none", "compute", "full"):
        given = ("--recompute", recompute, "--json", tmp_path / "x.json")
        status, _, err = run(*words.split(), *given, capsys=capsys)
        assert status == 0, err
        written = json.loads((tmp_path / "x.json").read_text())
        assert written["recompute"] == recompute
        exchanged_ms[recompute] = written["token_exchange_ms"]["rank"]
        layer_ms[recompute] = [row["layer_ms"] for row in written["rows"]]
    # Six All-to-Alls instead of four, with one more forward of the experts than `compute`.
    assert exchanged_ms["compute"] == exchanged_ms["none"]
    assert exchanged_ms["full"] == pytest.approx(1.5 * exchanged_ms["none"])
    for none_ms, compute_ms, full_ms in zip(*layer_ms.values(), strict=True):
        assert none_ms < compute_ms < full_ms


def test_the_command_reads_sizes_from_a_model(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    words = "--strategy static --mode forecast --json"
    for more, hidden, ffn, gated in (
        ([], 4096, 14336, True),
        (["--config", "mixtral-8x7b-e8k2", "--ffn", "7"], 4096, 7, True),
        (["--config", "tiny-moe"], 128, 128, True),
        (["--hidden", "64", "--ffn", "32"], 64, 32, True),
    ):
        status, _, err = run(path, *words.split(), tmp_path / "x.json", *more, capsys=capsys)
        assert status == 0, err
        sizes = json.loads((tmp_path / "x.json").read_text())["expert_sizes"]
        assert (sizes["hidden"], sizes["ffn"], sizes["gated"]) == (hidden, ffn, gated)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--capacity 3 2 3", "--capacity names 3 twice; leave one out"),
        ("--experts 4", "has 8 experts, not 4"),
        ("--experts 32768", "--experts: '32768' is no integer in 1..32767"),
        ("--ffn 1000000000000000000000", "is no integer in 1..1048576"),
        ("--lag 6", "--lag 6: no microbatch with tokens has a record 6 step(s) before it in its"),
        ("--lag 1000000001", "--lag: '1000000001' is no integer in 1..1000000000"),
        ("--every 31", "--every 31: the trace has 30 case(s); give a number of at most that"),
        ("--trace-ranks 2-5", "source ranks [4, 5] are not in the trace; it has ranks 0 to 3"),
    ],
)
def test_bad_input_is_quoted_and_told_what_works(tmp_path, trace, capsys, words, problem):
    path = recording(tmp_path / "x.trace", trace)
    status, out, err = run(path, *words.split(), capsys=capsys)
    assert status == 2
    assert problem in err and err.startswith("megatron-laer plan: ")
    assert out == "" and err.count("\n") == 1


def test_work_stops_after_the_hours_that_were_given(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    status, _, err = run(path, "--ranks", 4096, "--hours", "1e-6", capsys=capsys)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("megatron-laer plan: stopped after the 1e-06 hours of --hours; give")


def test_a_workload_takes_the_place_of_a_trace(tmp_path, capsys):
    words = "--workload W5 --ranks 4 --experts 8 --strategy static --mode forecast --steps 3"
    status, out, err = run(*words.split(), "--json", tmp_path / "x.json", capsys=capsys)
    assert status == 0, err
    assert "W5 zero expert rank, top-2, 4096 tokens per rank: 3 steps, 1 layers, 3 records" in out
    stock = json.loads((tmp_path / "x.json").read_text())["rows"][0]
    assert stock["strategy"] == STOCK and abs(stock["mean"] - 2.0) < 0.05


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "nothing to plan for: give a TRACE, or --workload with one of W0, W1"),
        ("x.trace --topk 2", "--topk 2: no effect here; add --workload, or leave --topk out"),
        ("--workload W8", "--workload: invalid choice: 'W8' (choose from"),
        ("--workload W1 --format csv", "--format csv: no effect here; --workload W1 reads no file"),
        ("--workload W1 --ranks 4", "has no experts of its own; give --experts or --config"),
        ("--workload W1 --ranks 4 --experts 2 --topk 3", "cannot have 3 of 2 experts; take a"),
        ("--workload W1 --ranks 4 --experts 2 --tokens 0", "--tokens: '0' is no integer in 1.."),
        (
            "--workload W1 --ranks 65536 --experts 32767 --steps 100000 --tokens 1",
            "100000 steps of 65536 ranks and 32767 experts",
        ),
    ],
)
def test_a_workload_with_bad_arguments_is_refused(capsys, words, problem):
    status, out, err = run(*words.split(), capsys=capsys)
    assert status == 2
    assert problem in err and out == "" and err.count("\n") == 1


def test_no_output_goes_into_a_folder_of_traces_or_over_a_yaml_file(tmp_path, trace, capsys):
    folder = tmp_path / "traces"
    folder.mkdir()
    path = recording(folder / "x.trace", trace)
    model = yaml_file("model", "tiny-moe")
    (tmp_path / "model.yaml").write_text(model.read_text())
    for words in (
        (folder, "--json", folder / "x.json"),
        (path, "--config", tmp_path / "model.yaml", "--json", tmp_path / "model.yaml"),
    ):
        status, _, err = run(*words, capsys=capsys)
        assert status == 2 and "would write over the input" in err
    assert (tmp_path / "model.yaml").read_text() == model.read_text()


def test_a_file_that_cannot_be_written_in_the_end_keeps_its_content(tmp_path, trace, capsys):
    path, output = recording(tmp_path / "x.trace", trace), tmp_path / "x.json"
    output.write_text("before")
    words = ("--strategy", "static", "--json", output)
    with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
        status, _, err = run(path, *words, capsys=capsys)
    assert status == 2
    assert "--json" in err and "cannot be written: [Errno 28] No space left" in err
    assert output.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.trace"]


def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    (tmp_path / "link.json").symlink_to("real.json")
    status, _, err = run(
        path, "--strategy", "static", "--json", tmp_path / "link.json", capsys=capsys
    )
    assert status == 0, err
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["ranks"] == 4


def test_a_trace_without_tokens_is_told_so(tmp_path, trace, capsys):
    empty = replace(trace, counts_RNE=np.zeros_like(trace.counts_RNE))
    status, _, err = run(recording(tmp_path / "x.trace", empty), capsys=capsys)
    assert status == 2 and "the trace holds no tokens; record a run that routes some" in err


def test_names_of_a_trace_cannot_forge_lines(tmp_path, trace, capsys):
    path = recording(tmp_path / "\x1b[31m\nFAKE", trace)
    status, out, err = run(path, "--strategy", "static", capsys=capsys)
    assert status == 0, err
    assert "\x1b" not in out and not any(line.startswith("FAKE") for line in out.splitlines())


def test_a_model_without_gates_is_planned_as_one_and_told_so(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    sizes = "hidden_size: 64, ffn-hidden-size: 32, num-experts: 8"
    for more, gated in (("", False), (", swiglu: true", True), (", quick_geglu: true", True)):
        (tmp_path / "x.yaml").write_text(f"{{description: d, moe: {{{sizes}{more}}}}}")
        words = ("--strategy", "static", "--config", tmp_path / "x.yaml")
        status, out, err = run(path, *words, "--json", tmp_path / "x.json", capsys=capsys)
        assert status == 0, err
        assert ("experts of 64 x 32, not gated" in out) is not gated
        assert json.loads((tmp_path / "x.json").read_text())["expert_sizes"]["gated"] is gated


def test_a_plot_without_matplotlib_is_refused_before_the_work(tmp_path, trace, capsys, monkeypatch):
    path = recording(tmp_path / "x.trace", trace)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = run(path, "--plot", tmp_path / "x.png", capsys=capsys)
    assert status == 2 and out == ""
    assert "--plot needs the package matplotlib: `pip install matplotlib`, or leave" in err


def test_a_plot_is_written_in_the_format_of_its_ending(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    for ending, magic in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")):
        words = ("--strategy", "greedy", "--mode", "forecast", "--plot", tmp_path / f"x.{ending}")
        assert run(path, *words, capsys=capsys)[0] == 0
        assert (tmp_path / f"x.{ending}").read_bytes().startswith(magic)


def test_neither_torch_nor_megatron_is_imported():
    code = (
        "import sys, megatron_laer.tools.traces, megatron_laer.tools.cli.plan; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron') for name in sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": python_path()}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.skipif(not SHARED_NPZ.exists(), reason=f"no trace at {SHARED_NPZ}")
def test_the_published_trace_is_planned(tmp_path, capsys):
    words = "--capacity 4 --strategy static laer greedy --every 499 --json"
    status, _, err = run(SHARED_NPZ, *words.split(), tmp_path / "x.json", capsys=capsys)
    assert status == 0, err
    rows = {
        (row["strategy"], row["mode"]): row
        for row in json.loads((tmp_path / "x.json").read_text())["rows"]
    }
    assert rows["greedy", "exact"]["load_over_bound"] == 1.0
    assert rows["greedy", "forecast"]["mean"] < rows["laer", "forecast"]["mean"]
    assert rows["laer", "forecast"]["mean"] < rows[STOCK, "-"]["mean"]
