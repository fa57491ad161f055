"""Command-line flags of `FSEPConfig`, one per field, made from the field's metadata.

A field `plan_lag` is the flag `--fsep-plan-lag`; its `help` is the flag's help and the row in the
docs. A flag without effect is an error here. `support` checks combinations with Megatron's flags.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_laer.config import (
    Auto,
    ExchangeAlgorithm,
    ExpertParallelMode,
    FixedPlanner,
    FSEPConfig,
    PlanMode,
    Restore,
    flag_name,
    takes_several,
    types_of,
    words_of,
)
from megatron_laer.files.checks import numbered
from megatron_laer.planner.strategies import described_strategies, uses_costs


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--expert-parallel-mode` and one flag per `FSEPConfig` field.

    Defaults are `None`, to distinguish a given flag: without effect, it is an error.
    """
    group = parser.add_argument_group(title="fully sharded expert parallel (megatron_laer)")
    group.add_argument(
        "--expert-parallel-mode",
        choices=[mode.value for mode in ExpertParallelMode],
        default=ExpertParallelMode.STANDARD.value,
        help="standard: Megatron's expert parallelism, untouched; fsep: ranks also "
        "compute other ranks' experts, chosen anew at every microbatch, so that none waits",
    )
    for spec in dataclasses.fields(FSEPConfig):
        text = spec.metadata["help"].replace("%", "%%")
        text = text.replace("{strategies}", described_strategies())
        default = "" if spec.default in (None, ()) else f" (default {spec.default})"
        words = words_of(spec.name)
        group.add_argument(
            flag_name(spec.name),
            default=None,
            # Plain strings, since Megatron pickles parsed arguments into checkpoints.
            type=str if words else _PARSERS.get(spec.name, types_of(spec.name)[0]),
            choices=words or None,
            nargs="+" if takes_several(spec.name) else None,
            help=text + default,
        )
    return parser


def _slots(text: str) -> int | None:
    """Parse a number of slots; None for `auto`, the default."""
    return None if text == Auto.AUTO else int(text)


_slots.__name__ = "int"  # in argparse's message
_PARSERS: Mapping[str, Callable[[str], Any]] = {"capacity": _slots}


def value_text(value: object) -> str:
    """Return a flag's value in a command line's form; "none" for an empty list of words."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields whose flags were given, with their values."""
    names = [spec.name for spec in dataclasses.fields(FSEPConfig)]
    values = {name: getattr(args, "fsep_" + name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def config_from_args(args: argparse.Namespace) -> FSEPConfig | None:
    """Return the config that the flags ask for, or None in standard mode."""
    given = given_flags(args)
    if args.expert_parallel_mode == ExpertParallelMode.FSEP:
        config = FSEPConfig(**given)
        idle = [
            f"{flag_name(name)} {value_text(given[name])}: no effect, since {reason}; leave it out"
            for reason, names in _idle(config)
            for name in names
            if name in given
        ]
        if idle:
            raise ValueError(numbered(idle))
        return config
    if given:
        flags = ", ".join(f"{flag_name(name)} {value_text(value)}" for name, value in given.items())
        raise ValueError(
            f"{flags}: no effect with --expert-parallel-mode {args.expert_parallel_mode}; "
            "add --expert-parallel-mode fsep or leave the flag out"
        )
    return None


def _idle(config: FSEPConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each reason with the fields whose flags it leaves without effect."""
    planning = ("plan_lag", "late_plan")
    made = {PlanMode.EXACT: "after the gate", PlanMode.ANNOUNCED: "from announced routing"}
    if config.mode in made:
        yield (
            f"--fsep-plan-mode {config.mode} makes every layout {made[config.mode]}",
            ("planner", *planning, "record_layouts"),
        )
    elif config.planner in FixedPlanner:
        yield (
            f"--fsep-planner {config.planner} makes no plans",
            (*planning, "record_layouts"),
        )
    if config.mode != PlanMode.ADAPTIVE:
        yield f"--fsep-plan-mode is {config.mode}", ("imbalance_tolerance",)
    if config.restore == Restore.STEP:
        yield "--fsep-restore step keeps all of them", ("restore_memory_gib",)
    if config.restore_algorithm == ExchangeAlgorithm.FLAT:
        yield "--fsep-restore-algorithm is flat", ("grad_wire_dtype",)
    if config.record_trace is None:
        yield "--fsep-record-trace is not given", ("sampled_sets",)
    if config.pairs_interval is None:
        yield "--fsep-pairs-interval is not given", ("sampled_sets",)
    if not uses_costs(config):
        yield "nothing is decided by cost", ("cluster",)
