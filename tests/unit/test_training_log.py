"""Megatron's log lines are read back exactly, and runs are compared over their steady steps."""

from __future__ import annotations

import io
import math
import sys

import pytest

from megatron_laer.telemetry import log


def line(number: int, of: int = 4, loss: float | None = None, **values: float) -> str:
    """Return a line as Megatron prints it, with torchrun's prefix; `values` are named freely."""
    if loss is not None:
        values = {log.LOSS: loss} | values
    shown = "".join(f" {name}: {value:.6E} |" for name, value in values.items())
    return (
        f"[n7 rank 3]:  [2026-01-02 03:04:05.678901] iteration {number:8d}/{of:8d} | consumed "
        f"samples: {number:12d} | elapsed time per iteration (ms): {10.0 * number:.1f} |{shown} "
        f"number of nan iterations:   0 |"
    )


def test_a_line_of_a_step_gives_its_values_and_others_give_none() -> None:
    step = log.step_of_line(line(3, loss=4.5, fsep_quota_ms=1.25))
    assert step is not None and (step.number, step.of) == (3, 4)
    expected = {log.LOSS: 4.5, log.STEP_MS: 30.0, "fsep_quota_ms": 1.25}
    assert step.values | expected == step.values
    step = log.step_of_line(line(1, loss=float("nan")))
    assert step is not None and math.isnan(step.values[log.LOSS])
    # Neither a long line nor a long number is gone through again and again.
    step = log.step_of_line(f" iteration 1/ 2 | {'a' * 10**6} | lm loss: 5 |")
    assert step is not None and step.values == {log.LOSS: 5.0}
    long = f" iteration {'9' * 10**6}/ 2 | lm loss: 5 |"
    for other in ("", long, "saving checkpoint at iteration      20 to /data", "lm loss: 3 |"):
        assert log.step_of_line(other) is None


def test_steps_that_were_made_again_are_as_they_were_the_last_time() -> None:
    run = log.read_run("x", [line(1, loss=3.0), line(2, loss=2.0), line(2, loss=2.5)])
    assert [step.values[log.LOSS] for step in run.steps.values()] == [3.0, 2.5]
    assert run.of == 4


def test_steps_have_the_number_of_the_run_that_the_log_named_last() -> None:
    begins = f"FSEP: training begins, {log.RUN} 0123456789abcdef"
    run = log.read_run("x", [line(1), begins, line(2), begins.replace("0", "f"), line(3)])
    assert [step.run for step in run.steps.values()] == [
        *(None, "0123456789abcdef", "f123456789abcdef")
    ]


def test_a_line_is_one_write_so_that_no_other_rank_comes_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", Pieces())
    log.say("FSEP: a line")
    assert written == ["FSEP: a line\n"]


def test_runs_are_compared_over_their_last_half_and_stock_has_what_fsep_counted_for_it() -> None:
    def balance(number: int) -> dict[str, float]:
        return {log.IMBALANCE: 1.0 + number, log.STOCK_IMBALANCE: 10.0 + number}

    fsep = log.read_run("fsep", [line(n, loss=5.0 - n, **balance(n)) for n in range(1, 5)])
    stock = log.read_run("standard", [line(n, loss=6.0 - n) for n in range(1, 5)])
    rows = [row.rsplit(maxsplit=2) for row in log.comparison([fsep, stock]).splitlines()]
    assert rows == [
        ["fsep", "standard"],
        ["steps in the log", "4", "4"],
        ["loss of its last step", "1.0000", "2.0000"],
        ["max/mean tokens per rank, iterations 3 to 4", "4.500", "13.500"],
        ["step time, median of iterations 3 to 4 (ms)", "35", "35"],
    ]
    rows = log.comparison([log.read_run("x", [line(1)])]).splitlines()
    assert [row.split()[-1] for row in rows] == ["x", "1", "-", "-", "10"]
