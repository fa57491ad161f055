"""`FSEPConfig`: all settings of FSEP, from which checks, flags and docs are made.

A field's annotation has its words or type, and its metadata help and bounds. `flags` reads command
lines; `support` checks combinations with Megatron's settings.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType, SimpleNamespace
from typing import Any, NamedTuple, Self, get_args, get_origin

from megatron_laer.choices import (
    VERIFY_DEFAULT,
    Auto,
    Choice,
    ExchangeAlgorithm,
    FixedPlanner,
    GemmBackEnd,
    LatePlan,
    OverlapScheduler,
    PlanMode,
    Preset,
    Restore,
    Sharding,
    Split,
    TokenExchange,
    Unproven,
    Verification,
    WireDtype,
)
from megatron_laer.files.checks import numbered
from megatron_laer.life import Kind, Kinds, kinds_of
from megatron_laer.rules import (
    LAER_PLANNER,
    RULES,
    problems_by,
    said,
    settings_with,
    sharding_for,
)


class Bound(NamedTuple):
    """Bound of a number, with the words after `must be at least` in the message."""

    value: int
    text: str


# Plans are kept in memory and in checkpoints until they take effect, and routing of a thousand
# steps ago is a poor forecast.
MAX_PLAN_LAG = 1000

# Settings that a preset stands for (docs/paper.md).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    Preset.LAER: {
        "sharding": Sharding.ROWS,
        "planner": LAER_PLANNER,
        "split": Split.EVEN,
        "plan_mode": PlanMode.FORECAST,
        "plan_lag": 1,
        "restore": Restore.LAYER,
        "restore_algorithm": ExchangeAlgorithm.FLAT,
        "token_exchange": TokenExchange.RANK,
    }
}

# Settings that a run takes for itself where none are given; with experts at home,
# `restore_algorithm` stays `auto` where each layout has its own.
_LEFT_OPEN = ("sharding", "capacity", "restore_algorithm", "token_exchange", "gemm", "node_size")

_NUMBERS: dict[type, Any] = {int: (Integral, "an integer"), float: (Real, "a finite number")}


# Fields with flags of their own; others are given by `--fsep-record DIR` or `--fsep-set`.
_WITH_FLAGS = frozenset(
    "preset sharding capacity planner plan_mode restore late_plan node_size token_exchange homes "
    "allow_unproven".split()
)


def _option(
    default: Any, help: str, *, minimum: Bound | None = None, maximum: Bound | None = None
) -> Any:
    """Return a field with its help and bounds; its annotation has its words or its type."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FSEPConfig:
    """Settings of Fully Sharded Expert Parallel.

    The FSEP group is Megatron's expert-parallel group, so its size N is
    `--expert-model-parallel-size`; E is `--num-experts`.

    Raises:
        ValueError: a value outside its range, or that contradicts the preset, quoting it.
    """

    preset: Preset | None = _option(
        None,
        "the settings of a published system: laer (rows, its planner, even splits, flat exchanges)",
    )
    sharding: Sharding | Auto = _option(
        Auto.AUTO, "ranks keep rows (1/N of every expert), experts (E/N whole ones), or auto"
    )
    capacity: int | None = _option(
        None,
        "number C of expert slots per rank and layer; default auto: the fastest by prediction",
        minimum=Bound(1, "1 slot per rank"),
        maximum=Bound(2**15 - 1, "32767; no layer has more experts"),
    )
    planner: str = _option("greedy", "strategy that plans layouts: {strategies}; random for tests")
    plan_mode: PlanMode | None = _option(
        None,
        "when layouts are made: forecast (ahead), exact (after the router), adaptive (whichever is "
        "faster), announced (from routing that is announced before the step)",
    )
    restore: Restore | float = _option(
        Restore.LAYER,
        "when experts are fetched: in each layer and microbatch (layer), the same but with up to "
        "GIB of them kept until backward, or once per step (step)",
        minimum=Bound(0, "0; 1.5 keeps 1.5 GiB"),
        maximum=Bound(4096, "4096; no card has more"),
    )
    late_plan: LatePlan = _option(
        LatePlan.KEEP, "if a plan is late: keep old layouts, or wait, so that runs repeat bitwise"
    )
    node_size: int | None = _option(
        None,
        "number G of ranks of the FSEP group on each node; default: as the launcher says",
        minimum=Bound(1, "1 rank"),
        maximum=Bound(2**20, "1048576; no node has more ranks"),
    )
    token_exchange: TokenExchange | Auto = _option(
        TokenExchange.RANK,
        "a token travels once per expert (rank), once per node and in it per rank (node), or auto",
    )
    homes: str | None = _option(
        None, "file of the home experts of each rank, by layer; default: as in stock Megatron"
    )
    record_layouts: str | None = _option(None, "every layout that was used")
    record_trace: str | None = _option(None, "routing of every microbatch, for `plan`")
    record_metrics: str | None = _option(
        None, "values and times of every step and layer, for `report`"
    )
    allow_unproven: tuple[Unproven, ...] = _option(
        (),
        "run untested: te-graphs (CUDA graphs up to the counts), dense-fp8 (all but experts), "
        "fp8-experts",
    )
    split: Split = _option(
        Split.EXACT,
        "how replicas share tokens: exact (least maximum load), even (as in the paper)",
    )
    imbalance_tolerance: float | None = _option(
        None,
        "excess over the mean load at which adaptive makes a fresh layout; default: by cost",
        minimum=Bound(0, "0; 0.05 allows a rank 5 % above the mean"),
        maximum=Bound(2**16, "65536; no rank of N has more than N times the mean load"),
    )
    plan_lag: int = _option(
        1,
        "number of steps from the routing that a plan is made from to its first use",
        minimum=Bound(1, "1; a plan cannot act on the step whose routing it was made from"),
        maximum=Bound(
            MAX_PLAN_LAG,
            f"{MAX_PLAN_LAG}; plans are kept in memory and in checkpoints for so many steps",
        ),
    )
    scheduler: OverlapScheduler = _option(
        OverlapScheduler.ON, "overlap of exchanges with the compute of neighbouring layers"
    )
    restore_algorithm: ExchangeAlgorithm | Auto = _option(
        Auto.AUTO,
        "how experts cross nodes: flat (one All-to-All), node (once per node), or auto",
    )
    grad_wire_dtype: WireDtype | None = _option(
        None,
        "dtype of gradients that restore_algorithm node sends between nodes; default: the weights'",
    )
    gemm: GemmBackEnd = _option(
        GemmBackEnd.LOOP,
        "how experts multiply: loop (torch.mm), te (Transformer Engine), torch (grouped_mm)",
    )
    cluster: str | None = _option(
        None, "hardware constants: a name in configs/clusters or a path; default: by device"
    )
    verify: str = _option(
        VERIFY_DEFAULT,
        "which exchanges of weights, gradients and tokens are checked: first (the first 2 steps "
        "and each new kind of exchange), N (one layer in turn at every N-th step), both joined by "
        "a comma, all, or off; with ,warn a finding skips the step, and stock's placement follows "
        "for the layer, where the run would stop",
    )
    stock_file: str | None = _option(
        None,
        "a file that rank 0 looks for at each step: while it is there, all layers have stock's "
        "placement",
    )
    pairs_interval: int | None = _option(
        None,
        "number of steps between counts of expert pairs in the recorded trace; default: no counts",
        minimum=Bound(1, "1; 100 counts every hundredth step"),
        maximum=Bound(2**24, "16777216; no run has more steps"),
    )
    sampled_sets: int | None = _option(
        None,
        "number of tokens per layer, evenly from all ranks, whose experts are recorded as well",
        minimum=Bound(1, "1 token"),
        maximum=Bound(2**24, "16777216; no rank has more in a microbatch"),
    )

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse values that contradict the preset, also those that are a field's default."""
        wanted = PRESETS.get(given.get("preset") or "", {})
        problems = [
            f"{setting(name, given[name])}: --fsep-preset {given['preset']} means "
            f"{setting(name, value)}; leave one of them out"
            for name, value in wanted.items()
            if name in given and given[name] != value
        ]
        if problems:
            raise ValueError(numbered(problems))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.preset in list(Preset):
            for name, value in PRESETS[self.preset].items():
                object.__setattr__(self, name, value)
        for name, spec in FIELDS.items():
            value = getattr(self, name)
            if value is not None or spec.default is not None:
                object.__setattr__(self, name, _checked(name, value))
        try:
            Verification.of(self.verify)
        except ValueError as error:
            raise ValueError(
                f"{setting('verify', self.verify)}: {error}; an example is {VERIFY_DEFAULT}"
            ) from error
        settings = settings_with(SimpleNamespace(), self)
        if problems := problems_by(RULES, settings):
            raise ValueError(numbered(problems))
        object.__setattr__(self, "sharding", sharding_for(settings)[0])

    @property
    def kept_gib(self) -> float:
        """Return the memory in which restored weights stay until backward."""
        return 0.0 if isinstance(self.restore, str) else self.restore

    @property
    def verification(self) -> Verification:
        return Verification.of(self.verify)

    @property
    def quantises_experts(self) -> bool:
        return Unproven.FP8_EXPERTS in self.allow_unproven

    @property
    def mode(self) -> PlanMode:
        """Return the plan mode in force."""
        if self.plan_mode is not None:
            return self.plan_mode
        is_fixed = self.planner in FixedPlanner
        is_kept = self.split == Split.EVEN or self.restore == Restore.STEP
        return PlanMode.FORECAST if is_fixed or is_kept else PlanMode.ADAPTIVE

    @property
    def kinds(self) -> Kinds:
        """Return the kinds that these settings give to all passes of a run."""
        return kinds_of(
            {
                Kind.ALONE: self.scheduler != OverlapScheduler.ON,
                Kind.FRESH: self.mode == PlanMode.EXACT,
                Kind.STEP: self.restore == Restore.STEP,
            }
        )

    @property
    def makes_plans(self) -> bool:
        """Return whether layouts come from a planner's thread."""
        is_planned = self.mode in (PlanMode.FORECAST, PlanMode.ADAPTIVE)
        return is_planned and self.planner not in FixedPlanner

    @property
    def follows_steps(self) -> bool:
        """Return whether any setting acts at step boundaries only."""
        written = (self.record_layouts, self.record_trace, self.record_metrics)
        return (
            self.makes_plans
            or self.mode == PlanMode.ANNOUNCED
            or self.restore == Restore.STEP
            or any(folder is not None for folder in written)
        )


FIELDS: Mapping[str, dataclasses.Field[Any]] = {
    spec.name: spec for spec in dataclasses.fields(FSEPConfig)
}


def flag_name(name: str) -> str:
    """Return a field's flag: `--fsep-planner`, `--fsep-set plan_lag`, `--fsep-record DIR trace`."""
    if name.startswith("record_"):
        return f"--fsep-record DIR {name.removeprefix('record_')}"
    return f"--fsep-{name.replace('_', '-')}" if name in _WITH_FLAGS else f"--fsep-set {name}"


def setting(name: str, value: object) -> str:
    """Return a field's value in a command line's form; see `rules.said`."""
    return said(flag_name(name), value)


def deterministic(config: FSEPConfig) -> FSEPConfig:
    """Return the config under Megatron's `--deterministic-mode`, which waits for plans."""
    return dataclasses.replace(config, late_plan=LatePlan.WAIT)


def settings_in_force(config: FSEPConfig) -> dict[str, Any]:
    """Return the settings that `auto` or a default leaves open, as plain values by field."""
    values = {name: getattr(config, name) for name in _LEFT_OPEN} | {"plan_mode": config.mode}
    return {
        name: value.value if isinstance(value, Choice) else value for name, value in values.items()
    }


def write_in_force(args: Any, settings: Mapping[str, Any]) -> None:
    """Write settings in force, in place of `auto`, to Megatron's arguments, which it saves."""
    vars(args).update({f"fsep_{name}": value for name, value in settings.items()})


def types_of(name: str) -> tuple[type, ...]:
    """Return the types of a field's value, or of each of its values, except None."""
    annotation = FIELDS[name].type
    members = get_args(annotation) or (annotation,)
    return tuple(kind for kind in members if kind not in (NoneType, Ellipsis))


def words_of(name: str) -> dict[str, Choice]:
    """Return the words that a field chooses from; none for a number or any text."""
    choices = (kind for kind in types_of(name) if issubclass(kind, Choice))
    return {word.value: word for choice in choices for word in choice}


def takes_several(name: str) -> bool:
    """Return whether a field holds any number of its words."""
    return get_origin(FIELDS[name].type) is tuple


def _checked(name: str, value: Any) -> Any:
    """Return a value in its field's type, or raise a ValueError that quotes it."""
    if not takes_several(name):
        return _checked_one(name, value)
    given = value if isinstance(value, list | tuple) else [value]
    return tuple(sorted({_checked_one(name, word) for word in given}))  # in one order on all ranks


def _checked_one(name: str, value: Any) -> Any:
    words = words_of(name)
    numbers = [_NUMBERS[kind] for kind in types_of(name) if kind in _NUMBERS]
    if isinstance(value, str) and value in words:
        return words[value]  # plain words become the members that they name
    if not words and not numbers:
        return value
    minimum, maximum = (FIELDS[name].metadata[bound] for bound in ("minimum", "maximum"))
    is_number = any(isinstance(value, number) for number, _ in numbers)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        needed = ("one of " if words else "") + ", ".join([*words, *(noun for _, noun in numbers)])
    elif minimum is not None and value < minimum.value:
        needed = f"at least {minimum.text}"
    elif maximum is not None and value > maximum.value:
        needed = f"at most {maximum.text}"
    else:
        return float(value) if float in types_of(name) else value  # 1 and 1.0 are one setting
    raise ValueError(f"{setting(name, value)}: must be {needed}")
