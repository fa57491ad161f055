"""`plan`: its output and files, and defaults from the metrics that a run recorded."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.trace_cases import Trace
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.tools import cli
from megatron_laer.tools.simulator.comparison import STOCK
from tests import shared_data
from tests.recorded_runs import OWN, record_run
from tests.records import rewrite
from tests.tools.plan_cases import drifting_trace, recording
from tests.traces import write_recording

ROOT = Path(__file__).resolve().parents[2]
SHARED_NPZ = shared_data.FOLDER / "smartmoe_trace_dev.npz"


@pytest.fixture(scope="module")
def trace():
    return drifting_trace()


def run(*words, capsys):
    try:
        status = cli.main(["plan", *map(str, words)])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def planned(tmp_path, *words, capsys):
    """Return the written JSON with the printed text and the rows' layer times."""
    status, out, err = run(
        *words, "--mode", "forecast", "--json", tmp_path / "x.json", capsys=capsys
    )
    assert (status, err) == (0, "")
    written = json.loads((tmp_path / "x.json").read_text())
    return written | {"out": out, "layer_ms": [row["layer_ms"] for row in written["rows"]]}


def test_the_command_prints_the_table_and_writes_the_figures(tmp_path, trace, capsys):
    path = recording(tmp_path / "group-0.trace", trace)
    words = "--ranks 8 --capacity 2 3 --node-size 4 --strategy greedy --mode forecast exact"
    status, out, err = run(path, *words.split(), "--json", tmp_path / "x.json", capsys=capsys)
    assert status == 0 and err == ""
    said = " ".join(out.split())
    assert "6 steps, 2 layers, 36 records, 8 experts, 4 ranks planned" in said
    assert "planned for 8 ranks in nodes of 4: experts of 4096 x 14336, 2 bytes" in out
    best = min(json.loads((tmp_path / "x.json").read_text())["rows"], key=lambda of: of["layer_ms"])
    named = f"{best['strategy']} {best['mode']}".removesuffix(" -")
    said = f"Shortest layer: {named}, C = {best['capacity']}, {best['layer_ms']:.3f} ms"
    assert out.startswith(said)
    lines = [line.split() for line in out.splitlines()]
    assert [line[:3] for line in lines if line and line[0] == "greedy"] == [
        ["greedy", mode, capacity] for capacity in "23" for mode in ("forecast", "exact")
    ]
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["ranks"], written["recorded_ranks"], written["node_size"]) == (8, 4, 4)
    assert [row["capacity"] for row in written["rows"]] == [1, 2, 2, 3, 3]


def test_the_command_reads_sizes_from_a_model(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    sizes = "hidden_size: 64, ffn-hidden-size: 32, num-experts: 8"
    for name, more in {
        "plain": "",
        "gated": ", swiglu: true",
        "quick": ", quick_geglu: true",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(f"{{description: d, moe: {{{sizes}{more}}}}}")
    for words, hidden, ffn, gated in (
        ("", 4096, 14336, True),
        ("--config tiny-moe", 128, 128, True),
        (f"--config {tmp_path}/plain.yaml", 64, 32, False),
        (f"--config {tmp_path}/gated.yaml", 64, 32, True),
        (f"--config {tmp_path}/quick.yaml", 64, 32, True),
    ):
        found = planned(tmp_path, path, "--strategy", "static", *words.split(), capsys=capsys)
        sizes = found["expert_sizes"]
        assert (sizes["hidden"], sizes["ffn"], sizes["gated"]) == (hidden, ffn, gated)
        assert (f"experts of {hidden} x {ffn}, not gated" in found["out"]) is not gated


def test_a_workload_takes_the_place_of_a_trace(tmp_path, capsys):
    words = "--workload W5 --ranks 4 --config mixtral-8x7b-e8k2 --strategy static"
    found = planned(tmp_path, *words.split(), capsys=capsys)
    expected = "W5 zero expert rank of mixtral-8x7b-e8k2: 8 steps, 4 layers, 32 records, 8 experts"
    assert expected in found["out"]
    stock = found["rows"][0]
    assert stock["strategy"] == STOCK and abs(stock["mean"] - 2.0) < 0.05


def test_an_output_is_replaced_whole_or_not_at_all(tmp_path, trace, capsys):
    path, output = recording(tmp_path / "x.trace", trace), tmp_path / "real.json"
    output.write_text("before")
    (tmp_path / "link.json").symlink_to("real.json")
    words = (path, "--strategy", "static", "--json", tmp_path / "link.json", "--force")
    with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
        status, _, err = run(*words, capsys=capsys)
    assert status == 2
    assert "--json" in err and "cannot be written: No space left" in err
    assert output.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"link.json", "real.json", "x.trace"}
    assert run(*words, capsys=capsys)[0] == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(output.read_text())["ranks"] == 4


def test_names_of_a_trace_cannot_forge_lines(tmp_path, trace, capsys):
    path = recording(tmp_path / "\x1b[31m\nFAKE", trace)
    status, out, err = run(path, "--strategy", "static", capsys=capsys)
    assert status == 0, err
    assert "\x1b" not in out and not any(line.startswith("FAKE") for line in out.splitlines())


@shared_data.needs(SHARED_NPZ.name)
def test_the_published_trace_is_planned(tmp_path, capsys):
    trace = tmp_path / "group-0.trace"
    write_recording(trace, Trace(SHARED_NPZ).counts)
    words = "--capacity 4 --strategy static laer greedy --every 499 --json"
    status, _, err = run(trace, *words.split(), tmp_path / "x.json", capsys=capsys)
    assert status == 0, err
    written = json.loads((tmp_path / "x.json").read_text())
    rows = {(row["strategy"], row["mode"]): row for row in written["rows"]}
    keys = ("greedy", "exact"), ("greedy", "forecast"), ("laer", "forecast"), (STOCK, "-")
    means = [rows[key]["mean"] for key in keys]
    assert means == sorted(set(means))


OF_THE_RUN = {
    "cluster": OWN.name,
    "hidden": "64",
    "ffn": "32",
    "gated": "False",
    "bytes_per_element": "4",
    "recompute": "full",
    "restore_algorithm": "node",
    "token_exchange": "node",
    "top_k": "3",
    "sharding": "rows",
}
QUICK = ("--strategy", "greedy", "--mode", "forecast", "--json")


def test_a_trace_is_planned_for_as_the_metrics_beside_it_say(tmp_path, capsys):
    record_run(tmp_path / "run", run=OF_THE_RUN, cluster=OWN)
    trace, out = tmp_path / "run" / "group-0.trace", tmp_path / "x.json"
    for path in (trace, tmp_path / "run"):
        status, text, err = run(path, *QUICK, out, capsys=capsys)
        assert (status, err) == (0, "")
        assert "4 ranks in nodes of 2: experts of 64 x 32, not gated, 4 bytes" in text
        assert ", on my-machine; what no flag gives is from " in " ".join(text.split())
    written = json.loads(out.read_text())
    assert written["expert_sizes"]["top_k"] == 3
    for name in ("bytes_per_element", "recompute", "restore_algorithm", "token_exchange"):
        assert str(written[name]) == OF_THE_RUN[name]

    # Flags win, and another model is in bf16.
    words = "--cluster h100-8 --config mixtral-8x7b-e8k2 --capacity 2 --sharding rows"
    status, text, err = run(trace, *words.split(), *QUICK, out, capsys=capsys)
    assert (status, err) == (0, "")
    # The recorded nodes belong to the recorded cluster.
    assert "for 4 ranks in nodes of 4: experts of 4096 x 14336, 2 bytes per number, tok" in text
    written = json.loads(out.read_text())
    assert written["bytes_per_element"] == 2
    assert [row["capacity"] for row in written["rows"]] == [2, 2]

    # Slots and nodes belong to the recorded number of ranks.
    status, text, _ = run(trace, "--ranks", 8, *QUICK, out, capsys=capsys)
    assert status == 0 and "planned for 8 ranks in nodes of 8: experts of" in text
    assert json.loads(out.read_text())["rows"][-1]["capacity"] == 2

    record_run(tmp_path / "strict", run=OF_THE_RUN | {"imbalance_tolerance": "0.02"})
    words = ("--strategy", "greedy", "--mode", "tolerance", "--json", out)
    assert run(tmp_path / "strict", *words, capsys=capsys)[0] == 0
    assert json.loads(out.read_text())["tolerance"] == 0.02


def test_defaults_take_the_place_of_a_run_that_was_not_described(tmp_path, capsys):
    record_run(tmp_path / "run", cluster=OWN)
    rewrite(METRICS.path(tmp_path / "run", 0), lambda kind, *_: kind == "step")
    status, out, _ = run(tmp_path / "run", *QUICK, tmp_path / "x.json", capsys=capsys)
    assert status == 0 and "experts of 4096 x 14336, 2 bytes per number, on a100-4x8-ib800" in out


def test_experts_stay_at_home_as_recorded_or_as_the_flag_says(tmp_path, capsys):
    record_run(tmp_path / "run", run=OF_THE_RUN | {"sharding": "experts"}, cluster=OWN)
    out = tmp_path / "x.json"
    words = ("--strategy", "static", "laer", "greedy", "--mode", "forecast", "--json", out)
    for flags, sharding in (((), "experts"), (("--sharding", "rows"), "rows")):
        status, text, err = run(tmp_path / "run", *flags, *words, capsys=capsys)
        assert (status, err) == (0, "")
        assert ("experts at home, on my-machine" in text) == (sharding == "experts")
        written = json.loads(out.read_text())
        assert written["sharding"] == sharding
        stock, static, laer, greedy = written["rows"]
        assert static["mean"] == stock["mean"] or sharding == "rows"
        assert (static["restored_bytes"] == 0) == (sharding == "experts")
        assert laer["restored_bytes"] > 0
        # A rank fetches at most its replica instead of three slots, and relays others' rows.
        assert (greedy["restored_bytes"] <= 2 * 2 * 64 * 32 * 4) == (sharding == "experts")
    for words, problem in (
        (("--ranks", 16), "8 experts cannot be at home on 16 ranks in equal numbers; give"),
        (("--capacity", 2), "--capacity 2: each rank has 2 home experts and needs a slot for rep"),
    ):
        status, _, err = run(tmp_path / "run", *words, capsys=capsys)
        assert status == 2 and problem in err and len(err.splitlines()) == 1
