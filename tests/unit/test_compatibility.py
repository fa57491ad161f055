"""The record of tested versions is sound, and the page agrees with it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_laer.releases import NEXT, TESTED
from tests import compatibility
from tests.compatibility import RECORD, Stack, here, record, recorded


def test_every_recorded_megatron_is_one_that_the_table_of_releases_calls_tested() -> None:
    stacks = recorded()
    assert {stack.megatron for stack in stacks} <= {*TESTED, *NEXT.tested}
    assert {TESTED[0], TESTED[-1], *NEXT.tested} <= {stack.megatron for stack in stacks}
    assert len({*stacks}) == len(stacks)


def test_a_set_that_has_passed_is_recorded_once_with_what_is_installed(tmp_path: Path) -> None:
    path = tmp_path / "tested.csv"
    shutil.copy(RECORD, path)
    stack = here("scripts/test.sh --some")
    assert stack.torch.startswith(metadata.version("torch").partition("+")[0])
    assert stack.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert stack.cards == "" and stack.communication == "gloo"
    before = recorded(path)
    assert record(stack, path) and not record(stack, path)
    assert recorded(path) == [*before, stack]


def test_a_card_of_the_record_is_tested_on_the_page_and_no_other_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = recorded()[0]
    card = dataclasses.replace(
        first, tests="scripts/test.sh --gpu", torch="2.99", cuda="13.9", cards="H100"
    )
    monkeypatch.setattr(compatibility, "recorded", lambda: [first])
    assert "| cards | nothing yet |" in "\n".join(compatibility.versions())
    monkeypatch.setattr(compatibility, "recorded", lambda: [first, card])
    rows = [line.split(" | ") for line in [*compatibility.versions()][2:]]
    tested = {row[0].removeprefix("| "): row[1] for row in rows}
    assert tested["torch, CUDA"] == "2.99" and tested["cards"] == "H100"
    assert tested["torch, CPU ranks"] == first.torch and tested["CUDA"] == "13.9"
    assert "| H100 |" in "\n".join(compatibility.combinations())


def test_a_stack_has_a_column_for_everything() -> None:
    names = [field.name for field in dataclasses.fields(Stack)]
    assert RECORD.read_text(encoding="utf-8").splitlines()[0] == ",".join(names)
