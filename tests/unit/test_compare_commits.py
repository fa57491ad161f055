"""Comparison of two commits: a difference is found, and measured times are none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.compare_commits import comparison, lasting, main
from tests.planner_states import make_state

LOSSES = {"lm loss, step 1": "5.5", "lm loss, step 2": "5.25"}


def test_a_number_that_differs_or_is_missing_is_shown() -> None:
    assert comparison(LOSSES, LOSSES) == "2 results are equal"
    assert comparison(LOSSES, LOSSES | {"lm loss, step 2": "5.2500005"}) == (
        "1 of 2 results DIFFER\n  lm loss, step 2: 5.25 before, 5.2500005 after"
    )
    assert "  lm loss, step 1: nothing before, 5.5 after" in comparison({}, LOSSES)


def test_an_unknown_commit_is_quoted_and_nothing_is_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["no-such-commit", "HEAD"]) == 2
    captured = capsys.readouterr()
    assert "'no-such-commit' is no commit of " in captured.err
    assert not captured.out


def test_how_long_planning_took_is_not_compared(tmp_path: Path) -> None:
    plans = tuple(dataclasses.replace(plan, plan_ms=0.25) for plan in make_state().plans)
    states = make_state(), make_state(plans=plans), make_state(version=6)
    paths = [tmp_path / f"{number}.bin" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        path.write_bytes(state.to_bytes())
    one, slower, another = map(lasting, paths)
    assert one == slower != another and paths[0].read_bytes() != paths[1].read_bytes()
