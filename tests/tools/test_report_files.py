"""The files of a run are told from others: what is no recording, and logs of other runs."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import pytest

from megatron_laer.runtime.planning.layout_recording import LAYOUTS
from megatron_laer.telemetry import log
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.telemetry.trace_file import TRACE
from megatron_laer.tools import cli
from megatron_laer.tools.report.assessment import assess
from megatron_laer.tools.report.run_files import lacks
from tests.recorded_runs import RUN_NUMBER, STEPS
from tests.records import records_of
from tests.tools.report_pages import data_of, figure_of, report, run_of, values_of, written

NO_FILES = {
    "is a link to nothing": lambda path: path.symlink_to("gone"),
    "is a pipe; give a regular file": os.mkfifo,
    "is a device; give a regular file": lambda path: path.symlink_to("/dev/null"),
    "is a folder; give a regular file": os.mkdir,
}


@pytest.mark.parametrize("says", NO_FILES)
@pytest.mark.parametrize("format", [TRACE, METRICS, LAYOUTS], ids=lambda of: of.suffix)
def test_what_is_no_file_under_a_recordings_name_is_refused(folder, tmp_path, capsys, format, says):
    path = format.path(folder, 0)
    path.unlink()
    NO_FILES[says](path)
    assert report(folder, "--out", tmp_path / "page.html") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}' {says}" in line
    if format != LAYOUTS:
        assert cli.main(["plan", str(folder)]) == 2
        assert f"{path}' {says}" in capsys.readouterr().err


def test_a_trace_of_another_group_is_named(folder, tmp_path, capsys):
    TRACE.path(folder, 0).rename(TRACE.path(folder, 1))
    page = html.unescape(written(tmp_path, folder))
    assert "no experts, and no what-if; 'group-1.trace' is of another group." in page
    METRICS.path(folder, 0).unlink()
    LAYOUTS.path(folder, 0).unlink()
    assert report(folder) == 2
    assert "holds no metrics of a run (only 'group-1.trace')" in capsys.readouterr().err


def cut_to(path, records):
    """Keep the header and the first records of a recording."""
    path.write_bytes(b"".join(records_of(path)[: 1 + records]))


def test_steps_that_one_recording_lacks_are_said_and_not_drawn(folder, tmp_path, caplog):
    cut_to(TRACE.path(folder, 0), 3 * 4)  # of 3 steps
    cut_to(LAYOUTS.path(folder, 0), 2)  # those of the steps 1 and 2
    page = written(tmp_path, folder)
    trace, layouts = caplog.messages
    assert (
        f"'{folder}/group-0.trace' lacks the iterations 4 to 5, which 'group-0.metrics' has"
        in trace
    )
    assert f"'{folder}/group-0.layouts' lacks the layouts of the iterations 4 to 5" in layouts
    assert {trace, layouts} <= {*re.findall("<li>(.*).</li>", html.unescape(page))}
    assert "experts had no token in the trace&#39;s iterations 1 to 3." in page
    titles = ("Tokens of each expert", "Slots of each expert", "Stock's placement: tokens of each")
    for title in titles:
        rows = values_of(data_of(page), title)
        assert all(row[3:] == [None, None] and None not in row[:3] for row in rows), title
    assert cli.main(["plan", str(TRACE.path(folder, 0))]) == 0
    assert caplog.messages[2:] == [trace]


def test_steps_that_the_metrics_lack_are_said(folder, tmp_path, caplog):
    cut_to(METRICS.path(folder, 0), 1 + 3)
    written(tmp_path, folder)
    assert cli.main(["plan", str(TRACE.path(folder, 0))]) == 0
    text = f"'{folder}/group-0.metrics' lacks the iterations 4 to 5, which 'group-0.trace' has"
    assert caplog.messages == [text, text]


def test_a_step_that_the_trace_has_in_part_is_said(folder, tmp_path, caplog):
    cut_to(TRACE.path(folder, 0), 4 * 4 + 3)
    written(tmp_path, folder)
    assert cli.main(["plan", str(TRACE.path(folder, 0))]) == 0
    text = "lacks microbatches of the iteration 5, which 'group-0.metrics' has"
    cut = f"'{folder}/group-0.trace' {text}"
    assert caplog.messages == [cut, cut]


def test_a_model_may_pass_a_layer_more_than_once_in_a_microbatch():
    both = Path("a.metrics"), {0: 12, 1: 24}, Path("a.trace"), {0: 8, 1: 16}
    assert list(lacks(*both)) == []
    cut = list(lacks(*both[:3], {0: 8, 1: 15}))
    assert cut == ["'a.trace' lacks microbatches of the iteration 2, which 'a.metrics' has"]


@pytest.mark.parametrize("damage", [len, lambda first: first[:40]], ids=["zeros", "cut"])
def test_layouts_without_a_whole_record_are_said_to_be_lost(folder, tmp_path, caplog, damage):
    path = LAYOUTS.path(folder, 0)
    header, first, *_ = records_of(path)
    path.write_bytes(header + bytes(damage(first)))
    written(tmp_path, folder)
    left_out, lacks = caplog.messages
    assert re.search(r"layouts: its last \d+ bytes are no whole record and are left out", left_out)
    assert "lacks the layouts of the iterations 2 to 5" in lacks


def logged(steps=range(STEPS), *, ms=100.0, loss=8.0, run=RUN_NUMBER):
    """Return a log of the run with this number, or of stock without one."""
    begins = "" if run is None else f"FSEP: training begins, {log.RUN} {run}\n"
    return begins + "".join(
        f" [time] iteration {at + 1:8d}/ 9 | consumed samples: {32 * at} | elapsed time per "
        f"iteration (ms): {ms:.1f} | lm loss: {loss - at} |"
        + ("\n" if run is None else " fsep_layer_ms: 20.0 |\n")
        for at in steps
    )


OTHER_RUN = "fedcba9876543210"


def test_a_log_is_the_runs_if_it_has_the_runs_number(folder, tmp_path):
    # With the times of this run, which do not make it this run's.
    (folder / "a.log").write_text(logged(loss=7.0, run=OTHER_RUN))
    page = html.unescape(written(tmp_path, folder))
    said = f"'a.log' is the log of the run {OTHER_RUN}, and not of {RUN_NUMBER}, so it is not used."
    assert said in page and "Loss" not in page
    # The logs of a run that was killed and resumed, one after another run in the same file.
    earlier = logged(loss=5.0, run=OTHER_RUN) + logged(range(2))
    (folder / "b.log").write_text(earlier + logged(range(2, 5), ms=150.0, loss=9.0))
    (folder / "c.log").write_text(logged(range(2, 5)))
    page = written(tmp_path, folder)
    chart = figure_of(data_of(page), "Loss")
    assert chart["data"][0]["y"] == [8.0, 7.0, 6.0, 5.0, 4.0]
    assert chart["text"].startswith("From b.log, c.log: ")


def test_steps_of_an_earlier_run_in_the_same_log_are_not_the_runs(folder, tmp_path):
    (folder / "train.log").write_text(logged(loss=5.0, run=OTHER_RUN) + logged(range(3)))
    chart = figure_of(data_of(written(tmp_path, folder)), "Loss")
    assert chart["data"][0]["y"] == [8.0, 7.0, 6.0]


def test_a_log_that_names_another_group_of_the_run_is_the_runs(folder, tmp_path):
    (folder / "train.log").write_text(logged(run=OTHER_RUN))
    assert "Loss" not in written(tmp_path, folder)
    content = METRICS.path(folder, 0).read_bytes()
    METRICS.path(folder, 1).write_bytes(content.replace(RUN_NUMBER.encode(), OTHER_RUN.encode()))
    assert figure_of(data_of(written(tmp_path, folder)), "Loss")


def test_a_log_with_metrics_and_without_a_number_is_neither_the_runs_nor_stocks(folder, tmp_path):
    (folder / "train.log").write_text(logged())
    (folder / "cut.log").write_text(logged(ms=200.0).partition("\n")[2])
    page = html.unescape(written(tmp_path, folder))
    assert "'cut.log' has FSEP's metrics and no line with fsep_run" in page
    assert "as measured" not in page


def gains_of(said):
    """Return the measured and the estimated gain in a verdict."""
    found = re.search(
        "FSEP is ([0-9.]+) times as fast as stock, measured in the iterations 3 to 5 of train.log "
        "and stock.log. The estimate from FSEP's run alone is ([0-9.]+) times, and usually too "
        "high: FSEP kept",
        " ".join(said.split()),
    )
    assert found is not None, said
    return found.groups()


def test_stocks_log_is_measured_against_and_not_drawn(folder, tmp_path, capsys):
    (folder / "stock.log").write_text(logged(ms=150.0, run=None))
    page = html.unescape(written(tmp_path, folder))
    assert "'stock.log' has no run's number and none of FSEP's metrics" in page
    assert "Loss" not in page
    # The first half of the iterations is in no gain, whatever it took.
    slow = logged(range(2), ms=9000.0) + logged(range(2, STEPS)).partition("\n")[2]
    (folder / "train.log").write_text(slow)
    page = html.unescape(written(tmp_path, folder))
    assert figure_of(data_of(page), "Loss")["text"].startswith("From train.log: ")
    run = run_of(folder)
    estimated = assess(run, run.logs).gain
    assert gains_of(page) == gains_of(capsys.readouterr().out) == ("1.50", f"{estimated:.2f}")
    assert "a step, median of the iterations 3 to 5 in train.log and in stock.log" in page
    other_batches = logged(run=None).replace("samples: 32", "samples: 64")
    for other in (logged(loss=8.1, run=None), other_batches):
        (folder / "stock.log").write_text(other)
        page = written(tmp_path, folder)
        assert ", measured in" not in page
        assert "Both shares are of the iterations 3 to 5; stock&#39;s is an estimate" in page


def test_a_measured_gain_far_from_the_estimated_one_is_not_claimed(folder, tmp_path, capsys):
    (folder / "train.log").write_text(logged())
    run = run_of(folder)
    estimated = assess(run, run.logs).gain
    for factor, is_claimed in ((1.28, True), (1 / 1.28, True), (1.32, False), (1 / 1.32, False)):
        ms = round(100 * estimated * factor, 1)
        (folder / "stock.log").write_text(logged(ms=ms, run=None))
        page = html.unescape(written(tmp_path, folder))
        out, times = capsys.readouterr().out, f"{ms / 100:.2f} times"
        for said in (page, out):
            assert (f"FSEP is {times} as fast as stock" in said) == is_claimed
            assert ("No speedup is claimed: in the iterations 3 to 5 of" in said) != is_claimed
            assert times in said and f"{estimated:.2f} times" in said


def test_a_run_is_averaged_over_the_iterations_that_stocks_log_reaches(folder, tmp_path):
    (folder / "train.log").write_text(logged())
    (folder / "stock.log").write_text(logged(range(3), ms=150.0, run=None))
    page = html.unescape(written(tmp_path, folder))
    assert "measured in the iterations 2 to 3 of train.log and stock.log" in page
    for said in ("max/mean tokens per rank, mean of the ", "speed in the ", " in the "):
        assert f"{said}iterations 2 to 3" in page
    # Lines of ten iterations each.
    text = re.sub("iteration +([0-9])/", r"iteration \g<1>0/", logged(range(1)))
    (folder / "train.log").write_text(text)
    (folder / "stock.log").write_text(text.partition("\n")[2].replace("fsep_", "x_"))
    assert run_of(folder).logs.measured is None  # of iterations that are not recorded


def test_the_report_and_plan_say_one_gain_of_one_window(folder, tmp_path, capsys):
    (folder / "train.log").write_text(logged())
    (folder / "stock.log").write_text(logged(ms=150.0, run=None))
    page = html.unescape(written(tmp_path, folder))
    gains = gains_of(capsys.readouterr().out)
    assert cli.main(["plan", str(folder), "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("FSEP is 1.50 times as fast as stock") and gains_of(out) == gains
    assert "microbatches of one layer each in the iterations 3 to 5, with" in out
    assert "predicted" in out and "in MoE layers alone" in " ".join(out.split())
    planned = json.loads((tmp_path / "x.json").read_text())
    assert planned["iterations"] == [3, 5]
    # The what-if replays the same microbatches: 3 iterations of 2 layers and 2 microbatches.
    assert {row["cases"] for row in planned["rows"]} == {12}
    assert {row["cases"] for row in data_of(page)["what_if"]} == {12}
    assert "in the iterations 3 to 5, for" in page


def test_stray_logs_are_named_in_one_line_and_refuse_no_page(folder, tmp_path, caplog):
    (folder / "train.log").write_text(logged())
    (folder / "folder.log").mkdir()
    (folder / "loop.log").symlink_to("loop.log")
    (folder / "long.log").touch()
    os.truncate(folder / "long.log", 2**36)  # sparse: a line that is not read to its end
    page = html.unescape(written(tmp_path, folder))
    assert figure_of(data_of(page), "Loss")
    (said,) = caplog.messages
    assert said == (
        "logs that are not read: 'folder.log' is no regular file; "
        f"{folder}/long.log, line 1: longer than 33,554,432 characters; "
        "'loop.log' is no regular file"
    )
    assert said[0].upper() + said[1:] + "." in page


@pytest.mark.parametrize("name", ["x.pdf", "page", "x.html.json"])
def test_a_page_of_another_kind_than_html_is_refused(folder, tmp_path, capsys, name):
    assert report(folder, "--out", tmp_path / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--out '{tmp_path / name}': the page is HTML; give a name that ends in .html" in line
    assert not (tmp_path / name).exists()
