"""The report page has its run's numbers, escapes quoted text, and is reproducible."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import markupsafe
import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from megatron_laer.telemetry.metrics_file import recording_path
from megatron_laer.tools import cli
from megatron_laer.tools.report import expert_figures
from megatron_laer.tools.report.assessment import assess, seconds
from megatron_laer.tools.report.bins import MAX_BINS, bin_edges, binned
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.plots import rounded
from megatron_laer.tools.report.recorded import recorded_run
from megatron_laer.tools.report.run_files import find_run
from megatron_laer.tools.traces import read_trace
from tests import fuzz
from tests.recorded_runs import RUN, STEPS, record_run
from tests.tools.plan_cases import drifting_trace, recording
from tests.tools.report_pages import data_of, figure_of, report, values_of, written

# Without the data, nearly all of the file is plotly.js.
MAX_BYTES = 6 * 2**20
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028\"'{{DATA}}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    record_run(run)
    return run


def test_the_page_has_the_numbers_of_the_recording(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = written(tmp_path, folder)
    data, recording = data_of(page), read_metrics(recording_path(folder, 0))
    of = recording.of_layers
    assert values_of(data, "FSEP: max/mean") == rounded(of["max_over_mean"].T)
    assert values_of(data, "Stock's placement, same") == rounded(of["stock_max_over_mean"].T)
    times = figure_of(data, "A step's time")["data"]
    assert times[0]["x"] == list(range(STEPS))
    for step, column in enumerate(zip(*(trace["y"] for trace in times), strict=True)):
        assert sum(column) == pytest.approx(recording.of_steps["step_ms"][step], rel=1e-3)
    for trace in figure_of(data, "Tokens of each expert")["data"]:
        assert np.mean(trace["z"], axis=0) == pytest.approx(np.ones(STEPS), rel=2e-2)
    for trace in figure_of(data, "Slots of each expert")["data"]:
        assert (np.sum(trace["z"], axis=0) == 4 * 3).all()
    fresh = 100 * of["fresh"].sum() / of["passes"].sum()
    assert f"{fresh:.4g} % of microbatches got a layout of their own" in page
    assert f"<td>{of['max_over_mean'].max():.4g}</td>" in page
    out, err = capsys.readouterr()
    assert "of forced balance; imbalance cost " in out
    assert err == ""


def test_the_assessment_is_worked_out_as_it_says(folder: Path) -> None:
    files = find_run(folder, None)
    assert files.trace is not None and files.metrics is not None
    run = recorded_run(files, read_metrics(files.metrics), read_trace(files.trace))
    assessment = assess(run)
    lost = stock = 0.0
    for step, layer in np.ndindex(run.imbalance_TL.shape):
        ratio, by_stock = run.imbalance_TL[step, layer], run.stock_TL[step, layer]
        time_s = run.layer_ms_TL[step, layer] * 1e-3
        lost += time_s - time_s / ratio
        stock += time_s / ratio * by_stock - time_s / ratio
    assert assessment.imbalance_s == pytest.approx(lost)
    assert assessment.stock_s == pytest.approx(stock)
    waits = sum(
        run.of_steps[name].sum() for name in ("restore_wait_ms", "reduce_wait_ms", "decide_ms")
    )
    total_s = run.of_steps["step_ms"].sum() * 1e-3
    assert assessment.kept == pytest.approx((total_s - lost - waits * 1e-3) / total_s)
    assert assessment.sentence().startswith(f"kept {100 * assessment.kept:.1f} % of forced balance")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1000, "1,000 s"),
        (41, "41 s"),
        (4.12, "4.1 s"),
        (0.41, "410 ms"),
        (0, "0 s"),
        (2e-5, "0.02 ms"),
    ],
)
def test_seconds_are_written_for_people(value: float, text: str) -> None:
    assert seconds(value) == text


def test_the_same_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert written(tmp_path, folder) == written(tmp_path, folder)


def test_the_page_loads_nothing_and_has_plotly_once(folder: Path, tmp_path: Path) -> None:
    page = written(tmp_path, folder)
    ours = page.replace(get_plotlyjs(), "")
    assert len(page.encode()) < MAX_BYTES and len(ours.encode()) < 2**17
    assert "default-src 'none'" in page
    assert re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", ours) == []
    assert "http" not in ours.replace('http-equiv="Content-Security-Policy"', "")
    assert "{{" not in ours


def test_plotly_knows_every_property_of_the_figures(folder: Path, tmp_path: Path) -> None:
    data = data_of(written(tmp_path, folder, "--compare", folder))
    assert len(data["figures"]) >= 15
    for figure in data["figures"]:
        go.Figure(figure["data"], figure["layout"])
        for axis in ("xaxis", "yaxis"):
            assert figure["layout"][axis]["title"]["text"], figure["title"]
        for trace in figure["data"]:
            assert trace["type"] != "heatmap" or trace["colorbar"]["title"]["text"]


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_a_missing_package_is_named_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
) -> None:
    monkeypatch.delitem(sys.modules, "megatron_laer.tools.report.page", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert report(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"report needs the package {package}: `pip install 'megatron_laer[tools]'`" in line


def test_a_run_that_goes_on_is_shown_up_to_its_last_whole_step(
    folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    data = data_of(written(tmp_path, folder))
    assert figure_of(data, "FSEP: max/mean")["data"][0]["x"][-1] == STEPS - 2


def test_what_a_run_says_of_itself_cannot_end_a_script_or_become_an_element(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x>&run"
    record_run(folder, layers=(HOSTILE, "layer 2"), run=RUN | {"planner": HOSTILE})
    page = written(tmp_path, folder)
    ours = page.replace(get_plotlyjs(), "")
    assert ours.count("<script") == ours.count("</script>") == 3
    assert "<img" not in ours
    assert str(markupsafe.escape(HOSTILE)) in ours
    assert "<" not in figure_of(data_of(page), "FSEP: max/mean")["data"][0]["y"][0]


def test_the_what_if_reckons_with_the_runs_exchange_of_experts_and_recompute(
    tmp_path: Path,
) -> None:
    found = {}
    for number, noted in enumerate(
        [
            {},
            {"restore_algorithm": "node", "recompute": "full"},
            {"restore_algorithm": "pigeon", "recompute": "True"},
        ]
    ):
        folder = tmp_path / str(number)
        record_run(folder, run=RUN | noted)
        found[number] = data_of(written(tmp_path, folder))["what_if"]
    assert all("--restore-algorithm flat --recompute none" in of["command"] for of in found[0])
    assert all("--restore-algorithm node --recompute full" in of["command"] for of in found[1])
    for noted_nothing, noted, noted_unknown in zip(*found.values(), strict=True):
        assert noted["layer_ms"] > noted_nothing["layer_ms"]
        assert noted_unknown["layer_ms"] == noted_nothing["layer_ms"]
    # The command computes the same.
    (row,) = [of for of in found[1] if (of["mode"], of["capacity"]) == ("adaptive", 3)]
    out = tmp_path / "row.json"
    assert cli.main([*shlex.split(row["command"])[3:], "--json", str(out)]) == 0
    (again,) = [of for of in json.loads(out.read_text())["rows"] if of["mode"] == "adaptive"]
    assert again["layer_ms"] == row["layer_ms"]


def test_a_trace_alone_is_replayed_as_training_would_have_planned_it(tmp_path: Path) -> None:
    trace = drifting_trace(steps=8)
    path = recording(tmp_path / "x.trace", trace)
    words = (path, "--capacity", 3, "--node-size", 2)
    data = data_of(written(tmp_path, *words))
    assert data["is_measured"] is False
    assert "A step's time" not in str(data)
    fsep = np.array(values_of(data, "FSEP: max/mean"))
    stock = np.array(values_of(data, "Stock's placement, same"))
    assert (fsep >= 1).all() and fsep.mean() < stock.mean()
    # From `plan`, in the same mode, without the first step, which has no forecast.
    plan = tmp_path / "plan.json"
    options = "--strategy greedy --mode adaptive --capacity 3 --node-size 2".split()
    assert cli.main(["plan", str(path), *options, "--json", str(plan)]) == 0
    (row,) = (row for row in json.loads(plan.read_text())["rows"] if row["strategy"] == "greedy")
    assert fsep[:, 1:].mean() == pytest.approx(row["mean"], rel=1e-3)


def test_two_runs_are_compared_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    record_run(other, steps=3, has_trace=False)
    page = written(tmp_path, folder, "--compare", other)
    data = data_of(page)
    for title in (f"{other}: max/mean", f"{other}: A step's time"):
        assert figure_of(data, title)["data"][0]["x"] == [0, 1, 2]
    assert f'<th scope="col">{other}</th>' in page


def test_a_run_without_a_trace_has_a_page_that_says_so(tmp_path: Path) -> None:
    record_run(tmp_path / "run", has_trace=False)
    page = written(tmp_path, tmp_path / "run")
    assert "Tokens of each expert" not in page and data_of(page)["what_if"] == []
    assert "Without --fsep-record-trace" in page


@pytest.mark.filterwarnings("error")
def test_a_run_whose_numbers_are_not_there_has_a_page_without_them(
    folder: Path, tmp_path: Path
) -> None:
    path = recording_path(folder, 0)
    path.write_text(
        fuzz.resealed(re.sub(r'("[a-z_]+_(?:ms|mean)":)[\d.e+-]+', r"\1null", path.read_text()))
    )
    page = written(tmp_path, folder)
    ours = page.replace(get_plotlyjs(), "")
    assert "step time, median" not in ours and not re.search(r"\bnan\b", ours)
    assert figure_of(data_of(page), "A step's time")["data"][1]["y"] == [0] * STEPS


def test_losses_of_a_log_beside_the_recordings_are_shown(folder: Path, tmp_path: Path) -> None:
    lines = [
        f" iteration {step:8d}/{STEPS:8d} | consumed samples: 8 | lm loss: {9 - step:.3E} |"
        for step in range(1, STEPS + 1)
    ]
    (folder / "train.log").write_text("\n".join(lines))
    (trace,) = figure_of(data_of(written(tmp_path, folder)), "Loss")["data"]
    assert (trace["x"], trace["y"]) == ([1, 2, 3, 4, 5], [8, 7, 6, 5, 4])


def test_steps_are_thinned_out_by_their_means() -> None:
    values_TL = np.arange(1000.0)[:, None] * [1.0, 2.0]
    values_TL[3, 1] = np.nan
    edges = bin_edges(1000, MAX_BINS)
    assert len(edges) - 1 <= MAX_BINS
    means_BL = binned(values_TL, edges)
    for place, (begin, end) in enumerate(itertools.pairwise(edges)):
        assert means_BL[place] == pytest.approx(np.nanmean(values_TL[begin:end], axis=0))
    assert np.isnan(binned(np.full((4, 1), np.nan), bin_edges(4, 2))).all()
    assert bin_edges(3, 240) == [0, 1, 2, 3]


def test_how_uneven_experts_are_is_the_gini_coefficient() -> None:
    assert expert_figures._gini(np.full(8, 5)) == pytest.approx(0)
    assert expert_figures._gini(np.array([0, 0, 0, 9])) == pytest.approx(0.75)
    assert expert_figures._gini(np.array([1, 3])) == pytest.approx(0.25)


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in ("metrics-0.jsonl", "group-0.trace", "group-0.jsonl")]


@pytest.mark.parametrize("place", range(3), ids=["metrics", "trace", "layouts"])
def test_a_damaged_recording_is_refused_by_name(
    folder: Path, tmp_path: Path, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _files(folder)[place]
    content = file.read_bytes()
    second = content.index(b"\n") + 40
    file.write_bytes(content[:second] + b"\xff\xff" + content[second + 2 :])
    assert report(folder, "--out", tmp_path / "page.html") == 2
    out, err = capsys.readouterr()
    assert out == "" and file.name in err and len(err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_recordings_of_different_runs_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "group-0.trace").unlink()
    recording(folder / "group-0.trace", drifting_trace(layers=3))
    assert report(folder, "--out", tmp_path / "page.html") == 2
    assert "they are of different runs, so move one away" in capsys.readouterr().err
