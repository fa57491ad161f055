"""Flags come from the dataclass, and each of them has an effect."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from megatron_laer.choices import Preset
from megatron_laer.config import PRESETS, FSEPConfig, deterministic, flag_name, setting
from megatron_laer.fsep_flags import add_arguments, check_known, config_from_args

CHOICES = (
    "restore late_plan split plan_mode scheduler restore_algorithm grad_wire_dtype token_exchange "
    "sharding preset"
)


def parse(*words: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words)


def test_defaults_and_values_of_flags_reach_their_fields() -> None:
    assert config_from_args(parse()) is None
    assert config_from_args(parse("--expert-parallel-mode", "standard")) is None
    assert config_from_args(parse("--expert-parallel-mode", "fsep")) == FSEPConfig()
    words = "--expert-parallel-mode fsep --fsep-capacity 3 --fsep-set plan_lag=2"
    given = parse(*words.split())
    assert config_from_args(given) == FSEPConfig(capacity=3, plan_lag=2)
    with pytest.raises(ValueError, match=r"--fsep-capacity 3.*no effect"):
        config_from_args(parse("--fsep-capacity", "3"))


def test_all_that_does_not_go_together_is_told_in_one_text() -> None:
    with pytest.raises(
        ValueError, match=r"^\(1\) --fsep-plan-mode exact with .*\(2\) --fsep-set pairs_in"
    ):
        FSEPConfig(restore="step", plan_mode="exact", pairs_interval=5)
    flags = "--fsep-plan-mode exact --fsep-planner laer --fsep-set plan_lag=2"
    with pytest.raises(
        ValueError, match=r"\(1\) --fsep-planner laer with .*\(2\) --fsep-set plan_lag=2"
    ):
        config_from_args(parse("--expert-parallel-mode", "fsep", *flags.split()))


def test_a_preset_sets_what_the_paper_does_and_no_flag_may_contradict_it() -> None:
    fsep = ["--expert-parallel-mode", "fsep", "--fsep-preset", "laer"]
    config = config_from_args(parse(*fsep, "--fsep-capacity", "2", "--fsep-set", "split=even"))
    assert config is not None and config == FSEPConfig(preset="laer", capacity=2)
    own = {name: getattr(config, name) for name in PRESETS[Preset.LAER]}
    assert own == PRESETS[Preset.LAER] and config.mode == "forecast"
    assert dataclasses.replace(deterministic(config), late_plan="keep") == config
    for name, wrong in (("split", "exact"), ("planner", "greedy"), ("sharding", "auto")):
        said = rf"{setting(name, wrong)}: --fsep-preset laer means {flag_name(name)}[ =]\w+; leave"
        with pytest.raises(ValueError, match=said):
            config_from_args(parse(*fsep, *setting(name, wrong).split()))
        with pytest.raises(ValueError, match=said):  # also a field's default
            FSEPConfig(preset="laer", **{name: wrong})
    with pytest.raises(ValueError, match=r"\(1\) .* plan_lag=2: .*\(2\) --fsep-restore step: "):
        FSEPConfig(preset=Preset.LAER, restore="step", plan_lag=2)


def test_settings_without_flags_of_their_own_are_given_by_name() -> None:
    fsep = "--expert-parallel-mode fsep --fsep-set plan_lag=2 split=even"
    config = config_from_args(parse(*f"{fsep} --fsep-set plan_lag=3 cluster=a=b".split()))
    assert config == FSEPConfig(plan_lag=3, split="even", cluster="a=b")
    for flags, wanted in (
        ("--fsep-restore step --fsep-restore 1.5", {"restore": 1.5}),
        ("--fsep-restore 1.5 --fsep-restore step", {"restore": "step"}),
        ("--fsep-record d", {"record_trace": "d", "record_metrics": "d"}),
        ("--fsep-record d --fsep-record e trace", {"record_trace": "e", "record_metrics": "d"}),
        ("--fsep-record trace layouts", {"record_layouts": "trace"}),
    ):
        assert config_from_args(parse(*f"--expert-parallel-mode fsep {flags}".split())) == (
            FSEPConfig(**wanted)
        )


def test_every_setting_is_given_once_in_the_help_and_by_its_form() -> None:
    text = add_arguments(argparse.ArgumentParser(prog="x")).format_help()
    for field in dataclasses.fields(FSEPConfig):
        flag, *_ = flag_name(field.name).split()
        assert text.count(f"\n  {flag} ") == 1
        if flag == "--fsep-set":
            assert text.count(f"\n    {field.name}=") == 1
        check_known(setting(field.name, "x").split())
        if f"--fsep-{field.name.replace('_', '-')}" != flag:
            with pytest.raises(ValueError, match=f"no such flag; give {flag_name(field.name)}"):
                check_known([f"--fsep-{field.name.replace('_', '-')}=1", "other"])


def test_slots_may_be_left_to_predicted_time_by_name() -> None:
    fsep = ["--expert-parallel-mode", "fsep"]
    assert config_from_args(parse(*fsep, "--fsep-capacity", "auto")) == FSEPConfig()
    assert config_from_args(parse(*fsep, "--fsep-capacity", "3")) == FSEPConfig(capacity=3)
    with pytest.raises(SystemExit):
        parse(*fsep, "--fsep-capacity", "most")


def test_constants_of_hardware_decide_how_tokens_go_if_nothing_else() -> None:
    flags = "--fsep-sharding rows --fsep-capacity 3 --fsep-set restore_algorithm=flat"
    flags += " --fsep-plan-mode exact"
    words = ["--expert-parallel-mode", "fsep", *flags.split(), "--fsep-set", "cluster=cpu-gloo"]
    with pytest.raises(ValueError, match="no effect"):
        config_from_args(parse(*words, "--fsep-token-exchange", "node"))
    assert config_from_args(parse(*words, "--fsep-token-exchange", "auto")) is not None


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("", "adaptive"),
        ("--fsep-planner static", "forecast"),
        ("--fsep-planner random", "forecast"),
        ("--fsep-planner laer --fsep-set split=even", "forecast"),
        ("--fsep-planner static --fsep-plan-mode adaptive", "adaptive"),
    ],
)
def test_the_plan_mode_by_default(words: str, mode: str) -> None:
    config = config_from_args(parse("--expert-parallel-mode", "fsep", *words.split()))
    assert config is not None and config.mode == mode


def test_deterministic_mode_waits_for_plans() -> None:
    assert deterministic(FSEPConfig()).late_plan == "wait"


def test_experts_in_fp8_need_them_at_home() -> None:
    flags = "--expert-parallel-mode fsep --fsep-allow-unproven fp8-experts".split()
    assert config_from_args(parse(*flags)) is not None
    says = "fp8-experts with --fsep-sharding rows: .*; but --fsep-planner laer"
    with pytest.raises(ValueError, match=says):
        config_from_args(parse(*flags, "--fsep-planner", "laer"))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("capacity", [0]),
        ("node_size", [0]),
        ("plan_lag", [0, 1001, 10**9]),
        ("imbalance_tolerance", [-0.5, float("inf")]),
        ("restore", [-0.5, float("inf"), 1e9]),
        ("sampled_sets", [0, 10**10]),
        *((name, ["pigeon"]) for name in CHOICES.split()),
    ],
)
def test_values_out_of_range_are_quoted(name: str, wrong: list[object]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=f"{flag_name(name).split()[0]} .*{value}"):
            FSEPConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "follows"),
    [
        ({}, True),
        ({"planner": "static"}, False),
        ({"planner": "random"}, False),
        ({"plan_mode": "exact"}, False),
        ({"plan_mode": "announced"}, True),
        ({"planner": "static", "restore": "step"}, True),
        ({"planner": "static", "record_trace": "d"}, True),
    ],
)
def test_what_happens_at_step_boundaries_only(values: dict[str, Any], follows: bool) -> None:
    assert FSEPConfig(**values).follows_steps is follows
