"""The report page has its run's numbers, escapes quoted text, and is reproducible."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import itertools
import json
import os
import re
import shlex
import sys
from dataclasses import replace

import markupsafe
import numpy as np
import plotly.graph_objects as go
import pytest

from megatron_laer.telemetry.log import RUN as FSEP_RUN
from megatron_laer.telemetry.metrics import LOGGED_NAMES, RECORDED_OF_STEPS
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.tools import cli
from megatron_laer.tools.report import page as page_of
from megatron_laer.tools.report.assessment import assess
from megatron_laer.tools.report.bins import MAX_BINS, bin_edges, binned
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.plots import rounded
from megatron_laer.tools.report.what_if import WhatIf
from megatron_laer.tools.simulator.comparison import PlanRow
from tests.recorded_runs import COSTS, LAYERS, OWN, RUN, RUN_NUMBER, STEPS, record_run
from tests.records import put_together, rewrite, taken_apart
from tests.tools import report_pages
from tests.tools.report_pages import data_of, figure_of, report, run_of, values_of, written

# Without the data, nearly all of the file is plotly.js.
MAX_BYTES = 1_600_000
# sha256 of the file in plotly.js-cartesian-dist-min 4.1.1.
PLOTLY = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028\"'{{DATA}}"


def test_the_page_has_the_numbers_of_the_recording(folder, tmp_path, capsys):
    page = written(tmp_path, folder)
    data, recording = data_of(page), read_metrics(METRICS.path(folder, 0))
    of = recording.of_layers
    assert values_of(data, "FSEP: max/mean") == rounded(of["max_over_mean"].T)
    assert values_of(data, "Stock's placement: max/mean") == rounded(of["stock_max_over_mean"].T)
    times = figure_of(data, "A step's time")["data"]
    assert times[0]["x"] == list(range(1, STEPS + 1))
    for step, column in enumerate(zip(*(trace["y"] for trace in times), strict=True)):
        assert sum(column) == pytest.approx(recording.of_steps["step_ms"][step], rel=1e-3)
    for trace in figure_of(data, "Tokens of each expert")["data"]:
        assert np.mean(trace["z"], axis=0) == pytest.approx(np.ones(STEPS), rel=2e-2)
    for trace in figure_of(data, "Slots of each expert")["data"]:
        assert (np.sum(trace["z"], axis=0) == 4 * 3).all()
    (moved,) = figure_of(data, "Weights moved")["data"]
    assert moved["y"] == [3 * step for step in range(STEPS)]  # MiB
    assert "0 % of microbatches had no replica" in page
    assert "<td>9.437 MB</td>" in page  # of the last three
    fresh = 100 * of["fresh"].sum() / of["passes"].sum()
    assert f"{fresh:.4g} % of microbatches got a layout of their own" in page
    last = slice(STEPS // 2, None)  # the iterations that are averaged
    assert f"<td>{of['stock_max_over_mean'][last].mean():.3f}</td>" in page
    out, err = capsys.readouterr()
    assert "of perfectly balanced speed; stock's placement of the same tokens" in out
    assert err == ""


def test_a_run_with_experts_at_home_shows_its_replicas(tmp_path):
    record_run(tmp_path / "run", run=RUN | {"sharding": "experts", "plan_mode": "forecast"})
    page = written(tmp_path, tmp_path / "run")
    data, recording = data_of(page), read_metrics(METRICS.path(tmp_path / "run", 0))
    of = recording.of_layers
    assert of["without_replicas"].any() and (of["replicas"] <= 1).all()
    share = 100 * of["without_replicas"].sum() / of["passes"].sum()
    assert f"{share:.4g} % of microbatches had no replica" in page
    for trace in figure_of(data, "Slots of each expert")["data"]:
        filled = np.sum(trace["z"], axis=0)
        assert filled[0] == 8 and (filled <= 4 * 3).all() and (np.array(trace["z"]) >= 1).all()
    assert {row["strategy"] for row in data["what_if"]} == {"stock EP", "greedy"}


def test_the_assessment_is_worked_out_as_it_says(folder):
    run = run_of(folder)
    assessment = assess(run, run.logs)
    lost = stock = 0.0
    averaged = range(STEPS // 2, STEPS)
    for step, layer in itertools.product(averaged, range(len(LAYERS))):
        ratio, by_stock = run.imbalance_TL[step, layer], run.stock_TL[step, layer]
        time_s = run.layer_ms_TL[step, layer] * 1e-3
        lost += time_s - time_s / ratio
        stock += time_s / ratio * by_stock - time_s / ratio
    assert assessment.imbalance_s == pytest.approx(lost)
    assert assessment.stock_s == pytest.approx(stock)
    names = ("restore_wait_ms", "reduce_wait_ms", "decide_ms")
    waits = sum(run.of_steps[name][averaged].sum() for name in names)
    total_s = run.of_steps["step_ms"][averaged].sum() * 1e-3
    balanced_s = total_s - lost - waits * 1e-3
    assert assessment.kept == pytest.approx(balanced_s / total_s)
    assert assessment.kept_by_stock == pytest.approx(balanced_s / (balanced_s + stock))
    kept = f"FSEP kept {100 * assessment.kept:.1f} % of perfectly balanced speed"
    assert assessment.sentence().startswith(kept)


def test_the_page_loads_nothing_and_is_the_same_each_time(folder, tmp_path):
    page = written(tmp_path, folder)
    ours = report_pages.without_plotly(page)
    assert len(page.encode()) < MAX_BYTES and len(ours.encode()) < 2**17
    assert "default-src 'none'" in page
    assert re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", ours) == []
    assert "http" not in ours.replace('http-equiv="Content-Security-Policy"', "")
    assert "{{" not in ours
    assert written(tmp_path, folder) == page
    packed = page.partition('id="plotly">')[2].partition("<")[0]
    script = gzip.decompress(base64.b64decode(packed))
    assert script.startswith(b"/**\n* plotly.js (cartesian - minified) v4.1.1\n")
    assert hashlib.sha256(script).hexdigest() == PLOTLY


def test_plotly_knows_every_property_of_the_figures(folder, tmp_path):
    data = data_of(written(tmp_path, folder))
    assert len(data["figures"]) >= 10
    for figure in data["figures"]:
        go.Figure(figure["data"], figure["layout"])
        for axis in ("xaxis", "yaxis"):
            assert figure["layout"][axis]["title"]["text"], figure["title"]
        for trace in figure["data"]:
            assert trace["type"] != "heatmap" or trace["colorbar"]["title"]["text"]


def test_a_missing_package_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "megatron_laer.tools.report.page", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert report(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "report needs the package jinja2: `pip install 'megatron_laer[tools]'`" in line


def test_a_run_that_goes_on_is_shown_up_to_its_last_whole_step(folder, tmp_path):
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    data = data_of(written(tmp_path, folder))
    assert figure_of(data, "FSEP: max/mean")["data"][0]["x"][-1] == STEPS - 1


def test_what_a_run_says_of_itself_cannot_end_a_script_or_become_an_element(tmp_path):
    folder = tmp_path / "<img src=x>&run"
    record_run(folder, layers=(HOSTILE, "layer 2"), run=RUN | {"planner": HOSTILE})
    page = written(tmp_path, folder)
    ours = report_pages.without_plotly(page)
    assert ours.count("<script") == ours.count("</script>") == 3
    assert "<img" not in ours
    assert str(markupsafe.escape(HOSTILE)) in ours
    assert "<" not in figure_of(data_of(page), "FSEP: max/mean")["data"][0]["y"][0]


def test_a_run_without_a_trace_has_a_page_that_says_so(tmp_path):
    record_run(tmp_path / "run", steps=3, has_trace=False)
    page = written(tmp_path, tmp_path / "run")
    assert "Tokens of each expert" not in page and data_of(page)["what_if"] == []
    assert "There is no &#39;group-0.trace&#39;, which --fsep-record DIR trace writes" in page


@pytest.mark.filterwarnings("error")
def test_a_run_whose_numbers_are_not_there_has_a_page_without_them(folder, tmp_path):
    def without_times(kind, step, values):
        for names, name in ((RECORDED_OF_STEPS, "of_step"), (LOGGED_NAMES, "metrics")):
            is_time = [of.endswith("_ms") for of in names]
            values |= {name: np.where(is_time, np.nan, values[name])} if kind == "step" else {}

    rewrite(METRICS.path(folder, 0), without_times)
    page = written(tmp_path, folder)
    ours = report_pages.without_plotly(page)
    assert "step time, median" not in ours and not re.search(r"\bnan\b", ours)
    assert figure_of(data_of(page), "A step's time")["data"][1]["y"] == [0] * STEPS


@pytest.mark.parametrize(
    "losses",
    [(8.0, 7.0, 6.0, 5.0, 4.0), (8.0, 7.0, "NAN", 6.0, "INF"), ("NAN",) * 5, (8.0, "-INF")],
)
def test_losses_of_a_log_are_shown_with_the_place_where_a_run_diverged(folder, tmp_path, losses):
    lines = [f" iteration {at}/ 9 | lm loss: {loss} |" for at, loss in enumerate(losses, 1)]
    (folder / "train.log").write_text("\n".join([f"{FSEP_RUN} {RUN_NUMBER}", *lines]))
    page = written(tmp_path, folder)
    (trace,) = figure_of(data_of(page), "Loss")["data"]
    assert trace["x"] == [*range(1, len(losses) + 1)]
    assert trace["y"] == [loss if isinstance(loss, float) else None for loss in losses]
    lost = [at for at, loss in enumerate(losses, 1) if isinstance(loss, str)]
    if not lost:
        assert "its loss is NaN or infinite" not in page
        return
    number = f"{len(lost)} of {len(losses)} logged iterations"
    place = f"first in iteration {lost[0]}."
    assert f"its loss is NaN or infinite in {number}, {place}" in page


def test_each_quantity_has_one_value(folder, tmp_path, capsys):
    page = html.unescape(written(tmp_path, folder))
    (kept,) = re.findall("FSEP kept ([0-9.]+ %) of", capsys.readouterr().out)
    assert re.findall("FSEP kept ([0-9.]+ %) of", page) == [kept]
    first, *_ = page.partition('id="what-if"')
    assert f"<td>{kept}</td>" in first
    # Of all recorded steps; the logged share is a prediction of other times.
    assert "share_of_forced_balance" not in report_pages.without_plotly(page)


def test_figures_by_steps_have_one_range_and_mark_where_a_run_went_on(folder, tmp_path):
    path = METRICS.path(folder, 0)
    fields, [run, *steps] = taken_apart(path)
    kind, _, values = run
    put_together(path, fields, [run, *steps[:3], (kind, 3, values), *steps[3:]])
    data = data_of(written(tmp_path, folder))
    by_steps = [figure["layout"] for figure in data["figures"] if figure["by_steps"]]
    assert len(by_steps) >= 8
    assert {tuple(layout["xaxis"]["range"]) for layout in by_steps} == {(0.5, STEPS + 0.5)}
    for layout in by_steps:
        assert [shape["x0"] for shape in layout["shapes"] if shape["x0"] == shape["x1"]] == [3.5]
        assert layout["annotations"][-1]["text"] == "resumed"


def test_steps_are_thinned_out_by_their_means():
    values_TL = np.arange(1000.0)[:, None] * [1.0, 2.0]
    values_TL[3, 1] = np.nan
    edges = bin_edges(1000, MAX_BINS)
    assert len(edges) - 1 <= MAX_BINS
    means_BL = binned(values_TL, edges)
    for mean_L, (begin, end) in zip(means_BL, itertools.pairwise(edges), strict=True):
        assert mean_L == pytest.approx(np.nanmean(values_TL[begin:end], axis=0))
    assert np.isnan(binned(np.full((4, 1), np.nan), bin_edges(4, 2))).all()


@pytest.mark.parametrize("name", "train.log group-0.layouts group-0.trace group-0.metrics".split())
def test_a_file_that_cannot_be_read_is_refused_by_name(folder, tmp_path, capsys, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read
    assert report(folder, "--out", tmp_path / "page.html") == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert f"'{folder}/{name}': Input/output error" in err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["group-1.metrics", "group-7.layouts", "new.log", "link.html"])
def test_no_page_is_written_under_a_name_that_is_read_the_next_time(folder, tmp_path, capsys, name):
    (folder / "link.html").symlink_to("new.log")
    assert report(folder, "--out", folder / name) == 2
    assert "would be read as a file of the run the next time" in capsys.readouterr().err


def test_texts_that_are_not_utf_8_are_shown_with_escapes(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    record_run(folder, run=RUN | {"planner": "\udce9"})
    page = written(tmp_path, folder)
    assert "caf\\udce9</h1>" in page and "<td>\\udce9</td>" in page


OTHER = {
    "cluster": OWN.name,
    "token_exchange": "node",
    "top_k": "3",
    "gated": "False",
    "bytes_per_element": "4",
    "restore_algorithm": "node",
    "recompute": "full",
}


@pytest.mark.parametrize(
    ("run", "cluster"),
    [
        (RUN, COSTS.cluster),
        (RUN | OTHER, OWN),
        (RUN | {"sharding": "experts"}, COSTS.cluster),
        (RUN | {"planner": "greedy", "imbalance_tolerance": "0.02"}, COSTS.cluster),
    ],
    ids=["shipped", "of its own", "at home", "with a tolerance"],
)
def test_commands_of_the_what_if_print_their_rows_again(tmp_path, run, cluster):
    folder = tmp_path / "run"
    record_run(folder, run=run, cluster=cluster)
    page = written(tmp_path, folder)
    rows = data_of(page)["what_if"]
    own = {"tolerance"} if "imbalance_tolerance" in run else set()
    assert {row["capacity"] for row in rows} == {2, 3, 4}
    assert {row["mode"] for row in rows} == {"-", "forecast", "exact", "adaptive", *own}
    lines = re.findall('<tr class="own">(.*?)</tr>', page, re.S)
    assert len(lines) == ("planner" in run)
    assert all(", tolerance 0.02" in line and ">this run&#39;s</td>" in line for line in lines)
    for number, row in enumerate(rows):
        words = shlex.split(row["command"])
        assert words[:4] == ["python", "-m", "megatron_laer", "plan"]
        out = tmp_path / f"{number}.json"
        assert cli.main([*words[3:], "--json", str(out)]) == 0
        keys = ("strategy", "mode", "capacity")
        again = json.loads(out.read_text())["rows"]
        (found,) = [one for one in again if all(one[key] == row[key] for key in keys)]
        for name in ("cases", "mean", "p99", "off_node_share", "replan_share", "layer_ms"):
            assert found[name] == row[name], (row["command"], name)


def test_rows_of_the_what_if_with_the_same_shown_numbers_are_one(folder):
    row = PlanRow("greedy", "forecast", 3, 10, 1.003, 1.005, 0.0, 0.0, 0.0, 208.0671)
    others = replace(row, capacity=4, layer_ms=208.0674), replace(row, mode="exact", layer_ms=214.7)
    rows = [WhatIf(of, of.mode, "") for of in (row, *others)]
    text = page_of.page(run_of(folder), rows)
    heads = "setting", "ms per layer"
    shown = [re.findall(f'<td data-head="{head}">(.*?)</td>', text) for head in heads]
    assert shown == [["C = 3 and 4, forecast", "C = 3, exact"], ["208.1", "214.7"]]
    assert "in the iterations 3 to 5, for" in text


def test_a_run_is_predicted_with_the_constants_that_it_recorded(tmp_path, capsys):
    """Use neither the default cluster's constants nor a file."""
    rows = {}
    for cluster in (OWN, COSTS.cluster):
        record_run(tmp_path / cluster.name, run=RUN | {"cluster": cluster.name}, cluster=cluster)
        page = written(tmp_path, tmp_path / cluster.name)
        assert f"2 bytes per number, on {cluster.name}." in page
        rows[cluster.name] = data_of(page)["what_if"]
        assert not any("--cluster" in row["command"] for row in rows[cluster.name])
    for own, other in zip(*rows.values(), strict=True):
        assert own["layer_ms"] > 1.5 * other["layer_ms"]
    page = written(tmp_path, tmp_path / OWN.name, "--cluster", COSTS.cluster.name)
    again, there = data_of(page)["what_if"], rows[COSTS.cluster.name]
    assert [row["layer_ms"] for row in again] == [row["layer_ms"] for row in there]
    assert all(f"--cluster {COSTS.cluster.name}" in row["command"] for row in again)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", "wide"),
        ("ffn", "0"),
        ("gated", "maybe"),
        ("recompute", "True"),
        ("restore_algorithm", "pigeon"),
        ("token_exchange", "auto"),
        ("top_k", "\x1b[31m"),
    ],
)
def test_recorded_settings_that_cannot_be_used_are_refused(tmp_path, capsys, name, value):
    record_run(tmp_path / "run", run=RUN | {name: value})
    assert report(tmp_path / "run", "--out", tmp_path / "page.html") == 2
    (line,) = capsys.readouterr().err.splitlines()
    shown = value.replace("\x1b", "\\x1b")
    assert f"group-0.metrics: the run's {name} '{shown}' cannot be used: " in line
