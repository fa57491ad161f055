"""The one way in for configuration: `FSEPConfig`, and the Megatron flags derived from it.

Flags are generated from the dataclass fields: a field `plan_lag` is the flag `--fsep-plan-lag`, its
`help` is the flag's help and the row in the docs. What a combination of flags means for Megatron is
not decided here (see `plugin.support`).
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

MODES = ("standard", "fsep")
LATE_PLANS = ("keep", "wait")

EXACT_SPLIT = "exact"
EVEN_SPLIT = "even"
SPLITS = (EXACT_SPLIT, EVEN_SPLIT)

SCHEDULERS = ("on", "off")

# Planners that need no thread and no broadcast: the layout never changes, or changes at every
# microbatch in a way that each rank works out alone (it is no strategy; strategies are asked once
# per step).
STATIC_PLANNER = "static"
RANDOM_PLANNER = "random"
FIXED_PLANNERS = (STATIC_PLANNER, RANDOM_PLANNER)
# Planners that compare candidates by the cost model.
PRICING_PLANNERS = ("laer",)


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class FSEPConfig:
    """Settings of Fully Sharded Expert Parallel.

    The FSEP group is Megatron's expert-parallel group, so its size N is
    `--expert-model-parallel-size`; E is `--num-experts`.

    Raises:
        ValueError: a value outside its range, quoting it.
    """

    capacity: int | None = _option(
        None,
        "expert slots C that every rank restores per MoE layer; default min(E, ceil(E/N) + 1), "
        "the least that always allows perfect balance",
        type=int,
    )
    planner: str = _option(
        "greedy",
        "strategy that chooses layouts on rank 0 of the FSEP group: greedy; search (slower); laer "
        "(the paper's); static; or random: a new random layout per microbatch, for tests",
        type=str,
    )
    split: str = _option(
        EXACT_SPLIT,
        "how a microbatch's tokens are split over an expert's replicas: exact (the largest rank "
        "load is minimal for the layout) or even (the paper's)",
        type=str,
        choices=SPLITS,
    )
    plan_lag: int = _option(
        1,
        "a plan made from the routing of step t takes effect at step t + LAG",
        type=int,
    )
    late_plan: str = _option(
        "keep",
        "when a plan is not ready in time: keep the layouts in force and never wait, or wait "
        "(bitwise reproducible; implied by --deterministic-mode)",
        type=str,
        choices=LATE_PLANS,
    )
    scheduler: str = _option(
        "on",
        "on: restores and gradient exchanges run while the layers beside them compute; off: each "
        "is waited for at once",
        type=str,
        choices=SCHEDULERS,
    )
    node_size: int | None = _option(
        None,
        "ranks of the FSEP group per node G; default: read from the launcher's LOCAL_WORLD_SIZE",
        type=int,
    )
    cluster: str = _option(
        "a100-4x8-ib800",
        "hardware constants for the planner's cost model: a name in configs/clusters or a path",
        type=str,
    )
    record_layouts: str | None = _option(
        None,
        "directory to which every applied layout is recorded, one file per FSEP group",
        type=str,
    )
    replay_layouts: str | None = _option(
        None,
        "directory written by --fsep-record-layouts whose layouts are repeated, step by step",
        type=str,
    )

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"--fsep-capacity {self.capacity}: must be at least 1 slot per rank")
        if self.plan_lag < 1:
            raise ValueError(
                f"--fsep-plan-lag {self.plan_lag}: must be at least 1; a plan cannot act on the "
                "step whose routing it was made from"
            )
        if self.late_plan not in LATE_PLANS:
            raise ValueError(
                f"--fsep-late-plan {self.late_plan!r}: must be one of {', '.join(LATE_PLANS)}"
            )
        if self.scheduler not in SCHEDULERS:
            raise ValueError(
                f"--fsep-scheduler {self.scheduler!r}: must be one of {', '.join(SCHEDULERS)}"
            )
        if self.split not in SPLITS:
            raise ValueError(f"--fsep-split {self.split!r}: must be one of {', '.join(SPLITS)}")
        if self.node_size is not None and self.node_size < 1:
            raise ValueError(f"--fsep-node-size {self.node_size}: must be at least 1 rank")


def flag_name(field_name: str) -> str:
    """`plan_lag` → `--fsep-plan-lag`."""
    return "--fsep-" + field_name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--expert-parallel-mode` and one flag per `FSEPConfig` field.

    Defaults are `None`, so that a flag the user gave without the mode can be told from one left
    out: a flag without effect is an error.
    """
    group = parser.add_argument_group(title="fully sharded expert parallel (megatron_laer)")
    group.add_argument(
        "--expert-parallel-mode",
        choices=MODES,
        default="standard",
        help="standard: Megatron's expert parallelism, untouched; fsep: every rank holds 1/N of "
        "every expert and restores whole experts per layer",
    )
    for spec in dataclasses.fields(FSEPConfig):
        options = dict(spec.metadata)
        default = "" if spec.default is None else f" (default {spec.default})"
        options["help"] = options["help"].replace("%", "%%") + default
        group.add_argument(flag_name(spec.name), default=None, **options)
    return parser


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Fields whose flags were given on the command line, with their values."""
    names = [spec.name for spec in dataclasses.fields(FSEPConfig)]
    values = {name: getattr(args, "fsep_" + name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def config_from_args(args: argparse.Namespace) -> FSEPConfig | None:
    """The config that the flags ask for, or None in standard mode.

    Raises:
        ValueError: an FSEP flag without `--expert-parallel-mode fsep`, which would have no effect.
    """
    given = given_flags(args)
    if args.expert_parallel_mode == "fsep":
        config = FSEPConfig(**given)
        _check_effects(config, given)
        return config
    if given:
        flags = ", ".join(f"{flag_name(name)} {value}" for name, value in given.items())
        raise ValueError(
            f"{flags}: no effect with --expert-parallel-mode {args.expert_parallel_mode}; "
            "add --expert-parallel-mode fsep or leave the flag out"
        )
    return None


def deterministic(config: FSEPConfig) -> FSEPConfig:
    """The config under Megatron's `--deterministic-mode`, which implies waiting for plans."""
    return dataclasses.replace(config, late_plan="wait")


def _check_effects(config: FSEPConfig, given: dict[str, Any]) -> None:
    """Raise if one given flag leaves another without effect, or would destroy what it names."""
    if config.replay_layouts is not None and config.replay_layouts == config.record_layouts:
        raise ValueError(
            f"--fsep-record-layouts {config.record_layouts}: is being replayed; record to another "
            "directory"
        )
    if config.replay_layouts is not None:
        reason = "layouts are replayed"
        idle: tuple[str, ...] = ("planner", "plan_lag", "late_plan", "cluster")
    elif config.planner not in PRICING_PLANNERS and "cluster" in given:
        reason, idle = f"--fsep-planner {config.planner} asks for no costs", ("cluster",)
    elif config.planner in FIXED_PLANNERS:
        reason = f"--fsep-planner {config.planner} makes no plans"
        idle = ("plan_lag", "late_plan", "cluster", "record_layouts")
    else:
        return
    for name in idle:
        if name in given:
            raise ValueError(
                f"{flag_name(name)} {given[name]}: no effect, since {reason}; leave it out"
            )
