"""Comparison of two commits: a difference is found, and an empty comparison is no equality."""

from __future__ import annotations

import tarfile

import pytest

from tests.compare_commits import comparison, main, without_times
from tests.old_files import FOLDER

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


def test_how_long_planning_took_is_not_compared() -> None:
    with tarfile.open(FOLDER / "checkpoint.tar.xz") as archive:
        file = archive.extractfile("checkpoint/iter_0000004/fsep_planner/group-0.bin")
        assert file is not None
        state = file.read()
    begin = state.index(b'"plan_ms":') + len(b'"plan_ms":')
    end = state.index(b"}", begin)
    header_bytes = int.from_bytes(state[12:16], "little") + len(b"1.5") - (end - begin)
    other = state[:12] + header_bytes.to_bytes(4, "little") + state[16:begin] + b"1.5" + state[end:]
    assert without_times(other) == without_times(state)
    assert without_times(state[:-40] + b"\x7f" + state[-39:]) != without_times(state)
