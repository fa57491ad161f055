"""`plan`: the table against plain recomputation, its files, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_laer import cli
from megatron_laer.files import memory
from megatron_laer.files.shipped import yaml_file
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.balance import max_over_mean, stock_tokens_N
from megatron_laer.planner.clusters import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.strategies import make_strategy, strategy_names
from megatron_laer.simulator import report
from megatron_laer.simulator.estimate import Work, check_fits
from megatron_laer.simulator.table import MODES, STOCK, simulate
from megatron_laer.trace import Trace, TraceWriter
from tests.processes import python_path

ROOT = Path(__file__).resolve().parents[2]
SHARED_NPZ = ROOT.parent / "shared" / "data" / "smartmoe_trace_dev.npz"

COSTS = CostModel(load_cluster("a100-4x8-ib800"), 4096, 14336, gated=True, bytes_per_element=2)
STRATEGIES = ("static", "laer", "greedy", "search")


def drifting_trace(steps=6, layers=2, microbatches=3, ranks=4, experts=8, seed=0):
    """Skewed counts whose hot experts move slowly, and jump in the last step."""
    luck = np.random.default_rng(seed)
    popularity = luck.gamma(0.3, size=(layers, experts)) + 0.01
    counts = np.empty((steps, layers, microbatches, ranks, experts), dtype=np.int64)
    for step in range(steps):
        popularity *= luck.uniform(0.8, 1.25, popularity.shape)
        if step == steps - 1:
            popularity = popularity[:, ::-1].copy()
        for layer, microbatch, rank in np.ndindex(layers, microbatches, ranks):
            shares = popularity[layer] / popularity[layer].sum()
            counts[step, layer, microbatch, rank] = luck.multinomial(4096, shares)
    step_R, layer_R, microbatch_R = (
        axis.reshape(-1) for axis in np.indices(counts.shape[:3], dtype=np.int64)
    )
    names = tuple(f"decoder.{layer}" for layer in range(layers))
    flat = counts.reshape(-1, ranks, experts).astype(np.int32)
    return Trace(names, step_R, layer_R, microbatch_R, flat)


def table(trace, capacity=3, node_size=2, strategies=STRATEGIES, modes=MODES, **more):
    geometry = Geometry(trace.num_ranks, trace.num_experts, capacity, node_size)
    rows = simulate(trace, [geometry], COSTS, strategies, modes, **more)
    return {(row.strategy, row.mode): row for row in rows}


def recording(path, trace):
    writer = TraceWriter(path, trace.num_ranks, trace.num_experts, trace.layers)
    for record in range(len(trace)):
        writer.append(
            int(trace.step_R[record]),
            int(trace.layer_R[record]),
            int(trace.microbatch_R[record]),
            trace.counts_NE(record),
        )
    writer.close()
    return path


@pytest.fixture(scope="module")
def trace():
    return drifting_trace()


@pytest.fixture(scope="module")
def rows(trace):
    return table(trace)


@pytest.mark.parametrize("lag", [1, 2])
def test_a_row_is_what_a_plain_loop_over_the_steps_gives(trace, lag):
    geometry = Geometry(4, 8, 3, 2)
    greedy = make_strategy("greedy", geometry=geometry, costs=COSTS)
    ratios, off_node, tokens, seconds = [], 0, 0, 0.0
    for layer in range(2):
        layout = ExpertLayout.static(4, 3, 8)
        states = [SmoothedForecast()]
        for step in range(6):
            records = np.flatnonzero((trace.step_R == step) & (trace.layer_R == layer))
            if step >= lag:
                layout = greedy.plan(states[step - lag + 1].counts_NE(), layout)
                for record in records:
                    counts_NE = trace.counts_NE(record)
                    quotas = exact_split(layout, 2).solve(counts_NE)
                    ratios.append(max_over_mean(quotas.rank_loads_N()))
                    off_node += int(quotas.totals().far_S.sum())
                    tokens += int(counts_NE.sum())
                    seconds += COSTS.layer_seconds(counts_NE, layout, 2)
            total_NE = sum(trace.counts_NE(record) for record in records)
            states.append(states[-1].observe(total_NE))
    row = table(trace, strategies=["greedy"], modes=["forecast"], lag=lag)["greedy", "forecast"]
    assert row.cases == len(ratios) == 2 * (6 - lag) * 3
    assert sorted(row.ratios_R) == pytest.approx(sorted(ratios))
    assert row.mean == pytest.approx(np.mean(ratios))
    assert row.max == pytest.approx(max(ratios))
    assert row.p95 == pytest.approx(np.percentile(ratios, 95))
    assert row.off_node_share == pytest.approx(off_node / tokens)
    assert row.layer_ms == pytest.approx(seconds / len(ratios) * 1e3)


def test_stock_is_megatrons_placement_and_restores_nothing(trace, rows):
    expected = [
        max_over_mean(stock_tokens_N(trace.counts_NE(record)))
        for record in range(len(trace))
        if trace.step_R[record] > 0
    ]
    row = rows[STOCK, "-"]
    assert row.mean == pytest.approx(np.mean(expected))
    assert (row.capacity, row.restored_bytes, row.plan_ms, row.replan_share) == (2, 0, 0, 0)


def test_there_is_no_stock_row_where_experts_do_not_divide(trace):
    assert (STOCK, "-") not in table(drifting_trace(experts=9), modes=["forecast"])


def test_rows_are_in_the_order_that_was_asked_for(rows):
    expected = [(STOCK, "-"), ("static", "forecast"), ("laer", "forecast")]
    expected += [(name, mode) for name in ("greedy", "search") for mode in MODES]
    assert list(rows) == expected
    assert {name: row.split for (name, _), row in rows.items()} == {
        STOCK: "even",
        "static": "exact",
        "laer": "even",
        "greedy": "exact",
        "search": "exact",
    }


def test_modes_do_what_they_promise(rows):
    forecast, exact = rows["greedy", "forecast"], rows["greedy", "exact"]
    assert exact.load_over_bound == 1.0
    assert forecast.max > 1.05
    assert (forecast.replan_share, forecast.fetched_bytes) == (0, 0)
    assert exact.replan_share > 0.9
    adaptive = rows["greedy", "adaptive"]
    assert adaptive.layer_ms <= min(forecast.layer_ms, exact.layer_ms)
    assert rows["greedy", "tolerance"].max <= 1.05
    assert 0 < rows["greedy", "tolerance"].replan_share < 1
    assert all(row.time_over_bound >= 1 and row.load_over_bound >= 1 for row in rows.values())


def test_a_forward_pass_restores_all_slots_and_what_changed_after_the_gate(rows):
    expert_bytes = 3 * 4096 * 14336 * 2
    assert rows["greedy", "forecast"].restored_bytes == 3 * expert_bytes * 3 / 4
    exact = rows["greedy", "exact"]
    ahead = exact.restored_bytes - exact.fetched_bytes
    assert ahead == pytest.approx(3 * expert_bytes * 3 / 4)
    assert 0 < exact.fetched_bytes <= 3 * expert_bytes * 3 / 4


def test_every_kth_case_is_a_part_of_all_of_them(trace, rows):
    part = table(trace, strategies=["static"], modes=["forecast"], every=7)["static", "forecast"]
    whole = rows["static", "forecast"]
    assert part.cases == -(-whole.cases // 7)
    assert part.ratios_R == whole.ratios_R[::7]


def test_the_bar_counts_every_case_and_is_closed(trace):
    seen = []

    def progress(cases):
        yield from cases
        seen.append(len(cases))

    row = table(trace, strategies=["static"], modes=["forecast"], progress=progress)
    assert seen == [row["static", "forecast"].cases]


def test_microbatches_without_tokens_are_no_cases(trace):
    counts = trace.counts_RNE.copy()
    counts[-1] = 0
    fewer = Trace(trace.layers, trace.step_R, trace.layer_R, trace.microbatch_R, counts)
    row = table(fewer, strategies=["static"], modes=["forecast"])["static", "forecast"]
    assert row.cases == 2 * 5 * 3 - 1


def test_a_layer_that_starts_late_has_cases_from_its_second_step_on(trace):
    chosen = np.flatnonzero((trace.layer_R == 0) | (trace.step_R >= 4))
    part = Trace(
        trace.layers,
        trace.step_R[chosen],
        trace.layer_R[chosen],
        trace.microbatch_R[chosen],
        trace.counts_RNE[chosen],
    )
    assert table(part, strategies=["static"])["static", "forecast"].cases == 5 * 3 + 1 * 3


def run(*words, capsys):
    try:
        status = cli.main(["plan", *map(str, words)])
    except SystemExit as stopped:  # by argparse
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
        ("--strategy eplb", "--strategy: invalid choice: 'eplb' (choose from"),
        ("--strategy greedy greedy", "--strategy names greedy twice"),
        ("--mode never", "--mode: invalid choice: 'never' (choose from"),
        ("--mode exact exact", "--mode names exact twice; leave one out"),
        ("--ranks 3", "cannot be planned for 3 ranks; use one of [1, 2, 4] or a multiple of 4"),
        ("--ranks 0", "--ranks: '0' is no integer in 1..65536"),
        ("--ranks 1_0", "--ranks: '1_0' is no integer in 1..65536"),
        ("--ranks 1000000000000", "--ranks: '1000000000000' is no integer in 1..65536"),
        ("--ranks 65536 --hours 1e-4", "planning 30 cases for 65,536 ranks would take about"),
        ("--capacity 1", "--capacity 1: 4 ranks need 2..8 slots each for 8 experts"),
        ("--capacity 9", "--capacity 9: 4 ranks need 2..8 slots each for 8 experts"),
        ("--capacity 0", "--capacity: '0' is no integer in 1..32767"),
        ("--capacity 3 2 3", "--capacity names 3 twice; leave one out"),
        ("--node-size 3", "--node-size 3, which does not divide the 4 ranks; use one of [1, 2, 4]"),
        ("--ranks 12", "given, and a100-4x8-ib800 has nodes of 8, which does not divide the 12"),
        ("--cluster moon", "unknown cluster 'moon'; known are ['a100-4x8-ib800'"),
        ("--config mixtral-8x7b-e16k4", "has 8 experts, not 16 as --experts or --config say"),
        ("--config gpt5", "unknown model 'gpt5'; known are ["),
        ("--experts 4", "has 8 experts, not 4"),
        ("--experts 32768", "--experts: '32768' is no integer in 1..32767"),
        ("--hidden 0", "--hidden: '0' is no integer in 1..1048576"),
        ("--ffn 1000000000000000000000", "is no integer in 1..1048576"),
        ("--tolerance -1", "--tolerance: '-1' is no number in 0..65536"),
        ("--tolerance nan", "--tolerance: 'nan' is no number in 0..65536"),
        ("--tolerance 0.1 --mode exact", "--tolerance 0.1: no effect without --mode tolerance"),
        ("--lag 6", "--lag 6: no microbatch with tokens has a record 6 step(s) before it in its"),
        ("--lag 1000000001", "--lag: '1000000001' is no integer in 1..1000000000"),
        ("--every 0", "--every: '0' is no integer in 1..1000000000"),
        ("--every 31", "--every 31: the trace has 30 case(s); give a number of at most that"),
        ("--hours nan", "--hours: 'nan' is no number in 1e-06..8760"),
        ("--format csv", "is not CSV"),
        ("--format xml", "--format: invalid choice: 'xml' (choose from"),
        ("--trace-ranks 0:3", "--trace-ranks: must be two numbers such as 0-7, got '0:3'"),
        ("--trace-ranks 3-1", "'3-1' is empty"),
        ("--trace-ranks 2-5", "source ranks [4, 5] are not in the trace; it has ranks 0 to 3"),
        ("--json nowhere/x.json", "--json 'nowhere/x.json': the folder"),
        ("--json /", "--json '/': it is there and no regular file"),
        ("--plot /dev/full", "--plot '/dev/full': it is there and no regular file"),
        ("--plot x", "--plot 'x': give a file that ends in ."),
    ],
)
def test_bad_input_is_quoted_and_told_what_works(tmp_path, trace, capsys, words, problem):
    path = recording(tmp_path / "x.trace", trace)
    status, out, err = run(path, *words.split(), capsys=capsys)
    assert status == 2
    assert problem in err and err.startswith("megatron-laer plan: ")
    assert out == "" and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--json", "--plot"])
@pytest.mark.parametrize("name", ["x.trace", "link.png", "hard.png", "./x.trace"])
def test_no_output_replaces_the_trace(tmp_path, trace, capsys, flag, name):
    path = recording(tmp_path / "x.trace", trace)
    (tmp_path / "link.png").symlink_to(path)
    (tmp_path / "hard.png").hardlink_to(path)
    before = path.read_bytes()
    status, out, err = run(path, flag, f"{tmp_path}/{name}", capsys=capsys)
    assert (status, out) == (2, "")
    assert f"{flag} '{tmp_path}" in err and "would write over the input" in err
    assert path.read_bytes() == before


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


def test_both_outputs_cannot_be_one_file(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    words = ("--json", tmp_path / "x.png", "--plot", f"{tmp_path}/./x.png")
    status, _, err = run(path, *words, capsys=capsys)
    assert status == 2 and "are one file; give two" in err


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


def test_an_empty_path_is_no_folder(capsys):
    for words in ([""], ["x", "--json", ""], ["x", "--plot", ""]):
        status, _, err = run(*words, capsys=capsys)
        assert status == 2 and "the path is empty; give a file" in err


def test_names_of_a_trace_cannot_forge_lines(tmp_path, trace, capsys):
    path = recording(tmp_path / "\x1b[31m\nFAKE", trace)
    status, out, err = run(path, "--strategy", "static", capsys=capsys)
    assert status == 0, err
    assert "\x1b" not in out and not any(line.startswith("FAKE") for line in out.splitlines())


def work(ranks, experts, records=36, lag=1, capacity=3):
    return Work(
        geometries=[Geometry(ranks, experts, capacity, 1)],
        strategies=STRATEGIES,
        modes=MODES,
        records=records,
        layers=2,
        plans=10,
        cases=30,
        lag=lag,
    )


def test_every_strategy_and_mode_has_an_estimate():
    for name in strategy_names():
        for mode in MODES:
            only = replace(work(8, 8), strategies=[name], modes=[mode])
            assert only.seconds > 0
            assert replace(only, geometries=work(16, 8).geometries).seconds > only.seconds


def test_a_plan_takes_no_more_memory_than_estimated(trace):
    wide = trace.with_ranks(512)
    geometry = Geometry(512, 8, 3, 8)
    tracemalloc.start()
    simulate(wide, [geometry], COSTS, strategy_names(), MODES)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of one process, whatever its size, and of what it holds of each count.
    assert peak_bytes < 2**24 + work(512, 8).bytes


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


def test_what_would_take_too_long_is_refused_with_what_would_fit():
    many = work(4096, 256)
    hours = many.seconds / 3600
    check_fits(many, hours * 1.01)
    with pytest.raises(ValueError, match=r"planning 30 cases for 4,096 ranks would take") as error:
        check_fits(many, hours / 3.5)
    said = str(error.value)
    assert "give --every 4, --ranks of about 1,170, fewer --strategy, or --hours" in said
    check_fits(replace(many, plans=many.plans / 4, cases=many.cases / 4), hours / 3.5)
    check_fits(work(1170, 256), hours / 3.5 * 1.1)


def test_what_would_take_too_much_memory_is_refused_with_what_would_fit(monkeypatch):
    many = work(4096, 256)
    monkeypatch.setattr(memory, "available_bytes", lambda: many.bytes // 4)
    with pytest.raises(ValueError, match=r"GiB of memory.* give --ranks of at most 1,02[34]$"):
        check_fits(many, 1e9)


def test_a_missing_and_an_empty_trace_are_refused(tmp_path, capsys):
    status, _, err = run(tmp_path / "none", capsys=capsys)
    assert status == 2 and "none' does not exist; give a file or a folder" in err
    TraceWriter(tmp_path / "x.trace", 2, 2, ["a"]).close()
    status, _, err = run(tmp_path / "x.trace", capsys=capsys)
    assert status == 2 and "holds no complete record; record at least two steps" in err


def test_a_plot_without_matplotlib_is_refused_before_the_work(tmp_path, trace, capsys, monkeypatch):
    path = recording(tmp_path / "x.trace", trace)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    status, out, err = run(path, "--plot", tmp_path / "x.png", capsys=capsys)
    assert status == 2 and out == ""
    assert "--plot needs the package matplotlib: `pip install matplotlib`, or leave" in err


def test_a_plot_is_written_in_the_format_of_its_ending(tmp_path, trace, capsys):
    path = recording(tmp_path / "x.trace", trace)
    for ending, magic in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")):
        words = ("--strategy", "greedy", "--mode", "forecast", "--plot", tmp_path / f"x.{ending}")
        assert run(path, *words, capsys=capsys)[0] == 0
        assert (tmp_path / f"x.{ending}").read_bytes().startswith(magic)


def test_a_plot_shows_how_far_each_row_is_from_perfect_balance(rows):
    axes = report.draw("title_$x", list(rows.values())).axes[0]
    assert len(axes.lines) == len(rows)
    for line, row in zip(axes.lines, rows.values(), strict=True):
        assert line.get_ydata().tolist() == pytest.approx([r - 1 for r in sorted(row.ratios_R)])
    heights = {
        row: axes.transData.transform((1, max(line.get_ydata())))[1]
        for line, row in zip(axes.lines, rows, strict=True)
    }
    # Perfect balance, a few percent and the paper's planner are apart on the picture.
    figure_height = axes.bbox.height
    exact, forecast = heights["greedy", "exact"], heights["greedy", "forecast"]
    assert forecast - exact > figure_height / 4
    assert heights[STOCK, "-"] - forecast > figure_height / 20


def test_neither_torch_nor_megatron_is_imported():
    code = (
        "import sys, megatron_laer.trace, megatron_laer.cli.plan; "
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
