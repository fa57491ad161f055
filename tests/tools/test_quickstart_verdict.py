"""The quick start claims the report's gain, and none where the machine was too busy."""

from __future__ import annotations

import html

import pytest

from megatron_laer.files.recording import run_of
from megatron_laer.telemetry.log import RUN
from megatron_laer.telemetry.metrics_file import METRICS
from megatron_laer.tools import cli
from scripts import quickstart
from tests.recorded_runs import STEPS, record_run

CPU_MS = {"FSEP": 100.0, "stock": 140.0}


def runs_of(*step_ms, cpu_ms=CPU_MS, first_ms=5000.0):
    """Return runs in the quick start's order, whose first half of steps is far slower."""
    slow = STEPS // 2
    return [
        quickstart.Run(
            name,
            losses=[8.0 - at for at in range(STEPS)],
            step_ms=[first_ms] * slow + [ms] * (STEPS - slow),
            cpu_ms=[first_ms] * (slow - 1) + [cpu_ms[name]] * (STEPS - slow),
            load_imbalance=[1.0] * STEPS,
        )
        for name, ms in zip(("FSEP", "stock", "stock", "FSEP"), step_ms, strict=True)
    ]


QUIET = (105.0, 150.0, 145.0, 101.0)


@pytest.mark.parametrize(
    ("step_ms", "why"),
    [
        (QUIET, None),
        ((105.0, 150.0, 145.0, 94.0), "equal trainings with FSEP took 94 and 105 ms per step"),
        ((105.0, 170.0, 145.0, 101.0), "equal trainings with stock took 145 and 170 ms per step"),
        # Steps that were seen on a busy machine, without a warning.
        ((1993.0, 3681.0, 3638.0, 2582.0), "with FSEP took 1993 and 2582 ms per step"),
        # Other programs slow all runs alike.
        ((131.0, 150.0, 145.0, 129.0), "a step with FSEP took 131 ms, 1.3 times the 100 ms of"),
        ((105.0, 190.0, 185.0, 101.0), "a step with stock took 190 ms, 1.4 times the 140 ms of"),
    ],
)
def test_a_machine_is_too_busy_if_equal_runs_differ_or_steps_exceed_their_processor_time(
    step_ms, why
):
    found = quickstart.why_too_busy(runs_of(*step_ms))
    assert (found is None) if why is None else why in found


@pytest.fixture
def work_dir(tmp_path):
    record_run(tmp_path)
    number = run_of(METRICS.path(tmp_path, 0))
    for name, begins, metric, ms in (
        ("fsep", f"{RUN} {number}\n", " fsep_layer_ms: 1.0 |", 100.0),
        ("stock", "", "", 150.0),
    ):
        lines = "".join(
            f" iteration {at}/ 9 | elapsed time per iteration (ms): {ms} | lm loss: 5 |{metric}\n"
            for at in range(1, STEPS + 1)
        )
        (tmp_path / f"{name}.log").write_text(begins + lines)
    return tmp_path


def test_the_headline_is_the_reports_first_sentence(work_dir, capsys):
    headline = quickstart._headline(runs_of(*QUIET), work_dir)
    assert headline.startswith("FSEP is 1.50 times as fast as stock, measured in the iterations 3 ")
    page = work_dir.parent / "page.html"
    assert cli.main(["report", str(work_dir), "--out", str(page)]) == 0
    assert headline in capsys.readouterr().out
    assert headline in html.unescape(page.read_text(encoding="utf-8"))


def test_on_a_busy_machine_neither_the_command_nor_its_page_claims_a_gain(work_dir):
    headline = quickstart._headline(runs_of(1993.0, 3681.0, 3638.0, 2582.0), work_dir)
    assert headline.startswith("No speedup is claimed, since this machine is too busy for one: ")
    page = work_dir.parent / "page.html"
    assert cli.main(["report", str(work_dir), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "times as fast" not in text and "1.50" not in text
    # A later run on a quiet machine leaves nothing of it.
    (work_dir / "stock.log").write_text((work_dir / "stock.log.disturbed").read_text())
    assert "measured in" in quickstart._headline(runs_of(*QUIET), work_dir)
    assert not (work_dir / "stock.log.disturbed").exists()


def test_the_table_has_the_medians_of_the_window_that_it_names():
    table = quickstart._comparison(runs_of(*QUIET), 2)
    rows = dict(line.rsplit(None, 4)[::4] for line in table.splitlines()[1:7])
    assert rows["step time, median (ms)"] == "101"
    assert "Balance and times are of the iterations 3 to 5." in table
