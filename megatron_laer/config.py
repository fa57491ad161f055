"""The one way in for configuration: `FSEPConfig`, and the Megatron flags derived from it.

Flags are generated from the dataclass fields: a field `plan_lag` is the flag `--fsep-plan-lag`, its
`help` is the flag's help and the row in the docs. What a combination of flags means for Megatron is
not decided here (see `support`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

STANDARD_MODE, FSEP_MODE = MODES = ("standard", "fsep")
LATE_PLANS = ("keep", "wait")

EXACT_SPLIT = "exact"
EVEN_SPLIT = "even"
SPLITS = (EXACT_SPLIT, EVEN_SPLIT)

SCHEDULERS = ("on", "off")
LAYER_RESTORE, STEP_RESTORE = RESTORES = ("layer", "step")

# What a microbatch is computed with: the planned layout, one made for its very counts after the
# gate, or the cheaper of the two.
FORECAST, EXACT, ADAPTIVE = PLAN_MODES = ("forecast", "exact", "adaptive")

# How exchanges cross nodes; `auto` takes the faster by the cost model.
FLAT, NODE = EXCHANGES = ("flat", "node")
AUTO = "auto"
WIRE_DTYPES = ("bf16", "fp16", "fp32")

# Planners that need no thread and no broadcast: the layout never changes, or changes at every
# microbatch in a way that each rank works out alone (it is no strategy; strategies are asked once
# per step).
STATIC_PLANNER = "static"
RANDOM_PLANNER = "random"
FIXED_PLANNERS = (STATIC_PLANNER, RANDOM_PLANNER)
# Planners that compare candidates by the cost model.
PRICING_PLANNERS = ("laer",)
DEFAULT_PLANNER = "greedy"

# Until they take effect, plans are kept in memory and in checkpoints; and what was routed a
# thousand steps ago says little of now.
MAX_PLAN_LAG = 1000


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
        DEFAULT_PLANNER,
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
    plan_mode: str | None = _option(
        None,
        "what a microbatch is computed with: forecast (the planned layout), exact (a fresh one, "
        "made after the gate for its very counts: no rank above the mean), or adaptive (per layer "
        "the cheaper of the two in predicted seconds); default adaptive, or forecast with a "
        "planner that makes no plans, --fsep-split even or --fsep-restore step",
        type=str,
        choices=PLAN_MODES,
    )
    imbalance_tolerance: float | None = _option(
        None,
        "adaptive takes the fresh layout where the planned one would load a rank with more than "
        "1 + TOLERANCE times the mean, instead of deciding by cost",
        type=float,
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
    restore: str = _option(
        "layer",
        "how often experts are restored: layer (for each layer and microbatch, forward and "
        "backward: two layers in memory), or step (once per step, gradients exchanged once: all "
        "layers in memory; implies --fsep-plan-mode forecast)",
        type=str,
        choices=RESTORES,
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
        "ranks of the FSEP group per node G; default: as the launcher says (torchrun's "
        "LOCAL_WORLD_SIZE)",
        type=int,
    )
    restore_algorithm: str = _option(
        AUTO,
        "how experts and their gradients cross nodes: flat (one All-to-All), node (each distinct "
        "expert of a node crosses once, then an exchange inside the node), or auto (the faster by "
        "the cost model)",
        type=str,
        choices=(*EXCHANGES, AUTO),
    )
    grad_wire_dtype: str | None = _option(
        None,
        "of gradients between nodes under --fsep-restore-algorithm node; default that of the "
        "weights",
        type=str,
        choices=WIRE_DTYPES,
    )
    cluster: str | None = _option(
        None,
        "hardware constants for the cost model: a name in configs/clusters or a path; default by "
        "the device's name",
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

    record_trace: str | None = _option(
        None,
        "directory to which the routing of every microbatch is recorded, one file per FSEP group, "
        "for `megatron_laer plan`",
        type=str,
    )
    timeline: str | None = _option(
        None,
        "directory to which a Chrome/Perfetto trace of steps 3 to 5 of the run is written, one "
        "file per rank: compute, token, parameter and gradient lanes",
        type=str,
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value, choices = getattr(self, spec.name), spec.metadata.get("choices")
            if choices is not None and value not in (spec.default, *choices):
                raise ValueError(
                    f"{flag_name(spec.name)} {value!r}: must be one of {', '.join(choices)}"
                )
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"--fsep-capacity {self.capacity}: must be at least 1 slot per rank")
        if self.plan_lag < 1:
            raise ValueError(
                f"--fsep-plan-lag {self.plan_lag}: must be at least 1; a plan cannot act on the "
                "step whose routing it was made from"
            )
        if self.plan_lag > MAX_PLAN_LAG:
            raise ValueError(
                f"--fsep-plan-lag {self.plan_lag}: must be at most {MAX_PLAN_LAG}; plans are kept "
                "in memory and in checkpoints for so many steps"
            )
        if self.imbalance_tolerance is not None and not 0 <= self.imbalance_tolerance < math.inf:
            raise ValueError(
                f"--fsep-imbalance-tolerance {self.imbalance_tolerance}: must be 0 or more; 0.05 "
                "allows a rank 5 % above the mean"
            )
        if self.node_size is not None and self.node_size < 1:
            raise ValueError(f"--fsep-node-size {self.node_size}: must be at least 1 rank")
        if self.restore == STEP_RESTORE and self.mode != FORECAST:
            raise ValueError(
                f"--fsep-plan-mode {self.mode}: --fsep-restore {STEP_RESTORE} keeps layouts for a "
                "step; leave one out"
            )
        if self.split == EVEN_SPLIT and self.mode != FORECAST:
            raise ValueError(
                f"--fsep-plan-mode {self.mode}: fresh layouts are made for exact splits, got "
                f"--fsep-split {EVEN_SPLIT}; leave one out"
            )

    @property
    def mode(self) -> str:
        """The plan mode in force."""
        if self.plan_mode is not None:
            return self.plan_mode
        is_fixed = self.planner in FIXED_PLANNERS and self.replay_layouts is None
        is_kept = self.split == EVEN_SPLIT or self.restore == STEP_RESTORE
        return FORECAST if is_fixed or is_kept else ADAPTIVE

    @property
    def plans(self) -> bool:
        """Whether layouts come from a planner's thread."""
        return (
            self.replay_layouts is None
            and self.planner not in FIXED_PLANNERS
            and self.mode != EXACT
        )

    @property
    def follows_steps(self) -> bool:
        """Whether anything that the settings ask for happens at step boundaries only."""
        written = (self.record_layouts, self.record_trace, self.timeline)
        return (
            self.plans
            or self.replay_layouts is not None
            or self.restore == STEP_RESTORE
            or any(folder is not None for folder in written)
        )

    @property
    def prices(self) -> bool:
        """Whether anything is decided by the cost model."""
        return (
            (self.mode == ADAPTIVE and self.imbalance_tolerance is None)
            or (self.plans and self.planner in PRICING_PLANNERS)
            or self.restore_algorithm == AUTO
        )


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
        default=STANDARD_MODE,
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
    if args.expert_parallel_mode == FSEP_MODE:
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
    """Raise if one given flag leaves another without effect."""
    for reason, idle in _idle(config):
        for name in idle:
            if name in given:
                raise ValueError(
                    f"{flag_name(name)} {given[name]}: no effect, since {reason}; leave it out"
                )


def _idle(config: FSEPConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Why flags have no effect, and which."""
    planning = ("plan_lag", "late_plan")
    if config.replay_layouts is not None:
        yield "layouts are replayed", ("planner", *planning)
    if config.mode == EXACT:
        yield (
            "--fsep-plan-mode exact makes every layout after the gate",
            ("planner", *planning, "record_layouts", "replay_layouts"),
        )
    elif config.planner in FIXED_PLANNERS:
        yield (
            f"--fsep-planner {config.planner} makes no plans",
            (*planning, "record_layouts"),
        )
    if config.mode != ADAPTIVE:
        yield f"--fsep-plan-mode is {config.mode}", ("imbalance_tolerance",)
    if config.restore_algorithm == FLAT:
        yield "--fsep-restore-algorithm is flat", ("grad_wire_dtype",)
    if not config.prices:
        yield "nothing is decided by cost", ("cluster",)
