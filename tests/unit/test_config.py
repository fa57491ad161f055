"""Flags come from the dataclass, and none of them is without effect."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from megatron_laer.config import (
    FSEPConfig,
    add_arguments,
    config_from_args,
    deterministic,
    flag_name,
)

pytestmark = pytest.mark.unit


def parse(*words: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words)


def test_without_the_mode_there_is_no_config() -> None:
    assert config_from_args(parse()) is None
    assert config_from_args(parse("--expert-parallel-mode", "standard")) is None


def test_defaults_of_flags_are_those_of_the_dataclass() -> None:
    assert config_from_args(parse("--expert-parallel-mode", "fsep")) == FSEPConfig()


def test_every_field_has_a_flag_with_help() -> None:
    text = add_arguments(argparse.ArgumentParser()).format_help()
    for spec in dataclasses.fields(FSEPConfig):
        assert flag_name(spec.name) in text
        assert spec.metadata["help"]


def test_values_reach_their_fields() -> None:
    config = config_from_args(
        parse("--expert-parallel-mode", "fsep", "--fsep-capacity", "3", "--fsep-plan-lag", "2")
    )
    assert config == FSEPConfig(capacity=3, plan_lag=2)


@pytest.mark.parametrize(
    "words",
    [
        ["--fsep-capacity", "3"],
        ["--expert-parallel-mode", "standard", "--fsep-planner", "laer"],
    ],
)
def test_a_flag_without_the_mode_is_an_error_that_quotes_it(words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{words[-2]} {words[-1]}.*no effect"):
        config_from_args(parse(*words))


@pytest.mark.parametrize("planner", ["static", "random"])
@pytest.mark.parametrize(
    "idle",
    [
        "--fsep-plan-lag 2",
        "--fsep-late-plan wait",
        "--fsep-record-layouts d",
        "--fsep-cluster cpu-gloo",
    ],
)
def test_a_flag_that_the_planner_ignores_is_an_error(planner: str, idle: str) -> None:
    words = ["--expert-parallel-mode", "fsep", "--fsep-planner", planner, *idle.split()]
    with pytest.raises(ValueError, match=f"{idle}.*{planner}"):
        config_from_args(parse(*words))


@pytest.mark.parametrize(
    "values",
    [{"capacity": 0}, {"plan_lag": 0}, {"late_plan": "never"}, {"node_size": 0}, {"split": "odd"}],
)
def test_values_out_of_range_are_quoted(values: dict[str, object]) -> None:
    (value,) = values.values()
    with pytest.raises(ValueError, match=str(value)):
        FSEPConfig(**values)  # type: ignore[arg-type]


def test_deterministic_mode_waits_for_plans() -> None:
    assert deterministic(FSEPConfig()).late_plan == "wait"
