"""Flags come from the dataclass, and each of them has an effect."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from megatron_laer.choices import Preset
from megatron_laer.config import PRESETS, FSEPConfig, deterministic, flag_name, setting
from megatron_laer.fsep_flags import add_arguments, check_known, config_from_args


def parse(*words: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words)


FSEP = "--expert-parallel-mode fsep"
PRICED = {"sharding": "rows", "capacity": 3, "restore_algorithm": "flat", "plan_mode": "exact"}


def test_without_the_mode_there_is_no_configuration() -> None:
    assert config_from_args(parse()) is None
    assert config_from_args(parse("--expert-parallel-mode", "standard")) is None


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("", {}),
        ("--fsep-capacity auto", {}),
        ("--fsep-capacity 3 --fsep-set plan_lag=2", {"capacity": 3, "plan_lag": 2}),
        (
            "--fsep-set plan_lag=2 split=even --fsep-set gemm=te",
            {"split": "even", "plan_lag": 2, "gemm": "te"},
        ),
        ("--fsep-set cluster=a=b", {"cluster": "a=b"}),
        ("--fsep-restore step --fsep-restore 1.5", {"restore": 1.5}),
        ("--fsep-restore 1.5 --fsep-restore step", {"restore": "step"}),
        ("--fsep-record d", {"record_trace": "d", "record_metrics": "d"}),
        ("--fsep-record d --fsep-record e trace", {"record_trace": "e", "record_metrics": "d"}),
        ("--fsep-record trace layouts", {"record_layouts": "trace"}),
        # Constants of hardware decide nothing else but how tokens go.
        (
            " ".join(setting(name, value) for name, value in PRICED.items())
            + " --fsep-set cluster=cpu-gloo --fsep-token-exchange auto",
            PRICED | {"cluster": "cpu-gloo", "token_exchange": "auto"},
        ),
    ],
)
def test_values_of_flags_reach_their_fields(flags: str, wanted: dict[str, Any]) -> None:
    assert config_from_args(parse(*f"{FSEP} {flags}".split())) == FSEPConfig(**wanted)


def refusal_of(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message with which a command line is refused."""
    words = [*FSEP.split(), *flags.split(" ")]
    try:
        check_known(words)
        config_from_args(parse(*words))
    except ValueError as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err.rpartition("error: ")[2].strip()
    return "taken"


DIGITS = "9" * 100_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # Numbers are quoted as passed, and have ASCII digits alone.
        ("--fsep-restore -1", "--fsep-restore -1: must be at least 0"),
        ("--fsep-restore 4097", "--fsep-restore 4097: must be at most 4096"),
        (f"--fsep-restore {10**20}", f"--fsep-restore {10**20}: must be at most 4096"),
        ("--fsep-restore inf", "--fsep-restore inf: must be one of layer, step, a finite number"),
        ("--fsep-set imbalance_tolerance=1e999", "tolerance=1e999: must be a finite number"),
        ("--fsep-set plan_lag=\uff12", "plan_lag=\uff12: must be an integer"),
        ("--fsep-set plan_lag=1_000", "plan_lag=1_000: must be an integer"),
        ("--fsep-set plan_lag=\t2", "plan_lag='\\t2': must be an integer"),
        ("--fsep-set plan_lag=+2", "plan_lag=+2: must be an integer"),
        ("--fsep-restore \uff11.5", "--fsep-restore \uff11.5: must be one of"),
        # Settings that were not given are not named, but what decides them.
        (
            "--fsep-planner static --fsep-set plan_lag=2",
            "--fsep-set plan_lag=2 with --fsep-planner static: no effect, since it makes no plans",
        ),
        (
            "--fsep-restore step --fsep-set imbalance_tolerance=5",
            "--fsep-set imbalance_tolerance=5 with --fsep-restore step: no effect, since adaptive",
        ),
        (
            "--fsep-plan-mode forecast --fsep-set imbalance_tolerance=0.5",
            "--fsep-set imbalance_tolerance=0.5 with --fsep-plan-mode forecast: no effect",
        ),
        # No message repeats a long value.
        (f"--fsep-set plan_lag={DIGITS}", "...9999"),
        (f"--fsep-set split={DIGITS}", "...9999"),
        (f"--fsep-restore {DIGITS}", "...9999"),
        (f"--fsep-capacity {DIGITS[:4000]}", "...9999"),
        (f"--fsep-record d {DIGITS}", "...9999"),
        (f"--expert-parallel-mode {DIGITS}", "...9999"),
        (f"--fsep-{DIGITS} 1", "...9999"),
        # A setting is given once; one without a name here leads to its name.
        ("--fsep-set plan_lag=2 plan_lag=3", "'plan_lag=3': plan_lag is given before"),
        ("--fsep-set plan_lag=2 --fsep-set plan_lag=2", "'plan_lag=2': plan_lag is given before"),
        ("--fsep-set cluster=", "--fsep-set cluster='': the name is empty; give a name in"),
        ("--fsep-set help", "'help': write name=value, of split, imbalance_tolerance, plan_lag,"),
        ("--fsep-set PLAN_LAG=2", "no setting of this list; give --fsep-set plan_lag=VALUE"),
        ("--fsep-set lag=2", "no setting of this list; did you mean --fsep-set plan_lag=VALUE?"),
        ("--fsep-restore-memory-gib 1", "no such flag; give --fsep-restore GIB"),
        ("--fsep-domain-nodes 2", "no such flag; layouts are planned for single nodes, whose"),
        ("--fsep-overlap", "no such flag; give --fsep-set scheduler=VALUE"),
    ],
    ids=lambda text: text[:40],
)
def test_a_refusal_quotes_the_words_and_leads_on(
    flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal_of(flags, capsys)
    assert said in message and message.count("9" * 201) == 0 and len(message) < 600


def test_one_number_is_one_setting() -> None:
    one, same = (config_from_args(parse(*FSEP.split(), "--fsep-restore", n)) for n in ("1", "1.0"))
    assert one is not None and one == same and str(one.restore) == "1.0"


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


@pytest.mark.parametrize("field", dataclasses.fields(FSEPConfig), ids=lambda field: field.name)
def test_values_out_of_range_are_quoted(field: dataclasses.Field[Any]) -> None:
    least, most = field.metadata["minimum"], field.metadata["maximum"]
    wrong: list[object] = [] if "str" in str(field.type) else ["pigeon", float("inf")]
    wrong += [] if least is None else [least.value - 1, -(10**9)]
    wrong += [] if most is None else [most.value + 1]
    for value in wrong:
        with pytest.raises(ValueError, match=f"{flag_name(field.name).split()[0]} .*{value}"):
            FSEPConfig(**{field.name: value})


# Settings, their plan mode, and whether something happens at step boundaries.
MODES: list[tuple[dict[str, Any], str, bool]] = [
    ({}, "adaptive", True),
    ({"planner": "static"}, "forecast", False),
    ({"planner": "random"}, "forecast", False),
    ({"planner": "laer", "split": "even"}, "forecast", True),
    ({"planner": "static", "plan_mode": "adaptive"}, "adaptive", False),
    ({"plan_mode": "exact"}, "exact", False),
    ({"plan_mode": "announced"}, "announced", True),
    ({"planner": "static", "restore": "step"}, "forecast", True),
    ({"planner": "static", "record_trace": "d"}, "forecast", True),
]


@pytest.mark.parametrize(("values", "mode", "follows"), MODES)
def test_the_plan_mode_and_what_happens_at_step_boundaries_follow_from_the_settings(
    values: dict[str, Any], mode: str, follows: bool
) -> None:
    config = FSEPConfig(**values)
    assert (config.mode, config.follows_steps) == (mode, follows)
