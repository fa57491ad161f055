"""Comparison of two commits: a difference is found, and an empty comparison is no equality."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.compare_commits import comparison, main, without_times
from tests.planner_states import make_state

LOSSES = {"lm loss, step 1": "5.5", "lm loss, step 2": "5.25"}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (LOSSES, LOSSES, "2  equal"),
        (
            LOSSES,
            LOSSES | {"lm loss, step 2": "5.2500005"},
            "1 DIFFER, first lm loss, step 2: 5.25 before, 5.2500005 after",
        ),
        (LOSSES, {}, "2 DIFFER, first lm loss, step 1: 5.5 before, nothing after"),
        ({}, {}, "0  NOTHING TO COMPARE"),
    ],
)
def test_a_number_that_differs_is_shown(
    before: dict[str, str], after: dict[str, str], said: str
) -> None:
    lines, is_equal = comparison({"losses": before}, {"losses": after})
    assert is_equal == (said == "2  equal")
    assert lines[1].startswith("losses") and said.split() == lines[1].split()[-len(said.split()) :]


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
    one, slower, another = map(without_times, paths)
    assert one == slower != another and paths[0].read_bytes() != paths[1].read_bytes()
