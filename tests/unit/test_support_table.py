"""The table of refusals has one row per setting, and links every field to the flag that sets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable

import pytest

from megatron_laer.support.fields import PROVED, WITHOUT_EFFECT
from megatron_laer.support.refusal import LeftOut, Refusal
from megatron_laer.support.table import REFUSALS

pytestmark = pytest.mark.releases

PROGRAM = """
import argparse, dataclasses, json
from megatron_laer.launch import prepare
prepare()
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
print(json.dumps([
    {flag: action.dest for action in parser._actions for flag in action.option_strings},
    [field.name for field in dataclasses.fields(TransformerConfig)],
]))
"""


def twice(names: Iterable[str]) -> list[str]:
    """The names that come more than once; "" is no name."""
    return [name for name, times in Counter(names).items() if name and times > 1]


def test_no_setting_is_in_the_table_twice() -> None:
    assert twice(row.setting for row in REFUSALS) == []
    assert twice(row.argument for row in REFUSALS) == []
    refused = [row.field for row in REFUSALS]
    assert twice([*refused, *PROVED, *WITHOUT_EFFECT]) == []


def test_every_field_that_has_a_flag_is_linked_to_it_and_every_flag_to_its_field() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    dests, fields = json.loads(result.stdout.splitlines()[-1])
    for row in REFUSALS:
        if row.flag in dests:
            assert dests[row.flag] == row.argument, row.setting
        if row.field in dests.values():
            assert row.argument == row.field, f"{row.field} has a flag: name it in the row"
        if row.argument in fields and row.argument not in PROVED:
            assert row.field, f"{row.argument} is a field of TransformerConfig: name it in the row"


def test_every_row_says_why_and_what_would_work() -> None:
    for row in REFUSALS:
        assert row.flag or row.field == row.setting, row.setting
        assert " " in row.reason and row.way_out, row.setting
    assert all(" " in reason for reason in WITHOUT_EFFECT.values())


def test_a_row_refuses_the_flag_and_the_field_for_the_same_reason() -> None:
    row = Refusal("--warp 9", "it breaks the hull", accepted=("impulse",), field="warp")
    settings = Namespace(warp="9")
    assert row.problem_with_flag(settings) == "--warp 9: it breaks the hull; leave it out"
    assert row.problem_with_field(settings) == "warp='9': it breaks the hull; must be 'impulse'"
    assert row.problem_with_flag(Namespace(warp="impulse")) is None
    assert row.problem_with_flag(Namespace(warp=None)) is None, "left out"
    assert row.problem_with_field(Namespace()) is None, "a Megatron without the field"


def test_what_is_speed_only_says_so_by_flag_and_by_field() -> None:
    row = Refusal("--warp 9", "it breaks the hull", field="warp", left_out=LeftOut.SPEED)
    for said in (
        row.problem_with_flag(Namespace(warp=9)),
        row.problem_with_field(Namespace(warp=9)),
    ):
        assert said is not None and said.endswith(" (it is speed-only)")
    other = Refusal("--warp 9", "it breaks the hull", left_out=LeftOut.PRECISION)
    assert "speed-only" not in str(other.problem_with_flag(Namespace(warp=9)))
