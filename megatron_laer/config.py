"""`FSEPConfig`: all settings of FSEP, from which checks, flags and docs are made.

A field's annotation has its words or type, and its metadata help and bounds. `flags` reads command
lines; `support` checks combinations with Megatron's settings.

Over 400 lines: one list of settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from typing import Any, NamedTuple, Self, get_args, get_origin, get_type_hints

from megatron_laer.choices import (
    Auto,
    Choice,
    ExchangeAlgorithm,
    ExpertParallelMode,
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
    WireDtype,
)
from megatron_laer.files.checks import numbered, quoted

# Words of the fields are imported from here too.
__all__ = [
    "LAER_PLANNER",
    "MAX_PLAN_LAG",
    "PRESETS",
    "Auto",
    "Bound",
    "Choice",
    "ExchangeAlgorithm",
    "ExpertParallelMode",
    "FSEPConfig",
    "FixedPlanner",
    "GemmBackEnd",
    "LatePlan",
    "OverlapScheduler",
    "PlanMode",
    "Preset",
    "Restore",
    "Sharding",
    "Split",
    "TokenExchange",
    "Unproven",
    "WireDtype",
    "deterministic",
    "flag_name",
    "lays_out_freely",
    "takes_several",
    "types_of",
    "words_of",
]


class Bound(NamedTuple):
    """Bound of a number, with the words after `must be at least` in the message."""

    value: int
    text: str


# Plans are kept in memory and in checkpoints until they take effect, and routing of a thousand
# steps ago is a poor forecast.
MAX_PLAN_LAG = 1000

# The paper's planner; names of its variants begin with it. It leaves no expert at home.
LAER_PLANNER = "laer"

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

_NUMBERS: dict[type, Any] = {int: (Integral, "an integer"), float: (Real, "a number")}


def _option(
    default: Any, help: str, *, minimum: Bound | None = None, maximum: Bound | None = None
) -> Any:
    """Return a field with its help and bounds; its annotation has its words or its type."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


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
        "a published system: laer (rows, planner laer, even splits, flat exchanges)",
    )
    capacity: int | None = _option(
        None,
        "expert slots C of every rank per MoE layer, or auto, the default: min(E, ceil(E/N) + "
        "1), the least that always allows perfect balance, or more where the cost model finds "
        "them faster (at home up to two, as rows up to all experts on each node), and with "
        "HybridEP the next that makes N*C a multiple of 4",
        minimum=Bound(1, "1 slot per rank"),
    )
    sharding: Sharding | Auto = _option(
        Auto.AUTO,
        "share of a rank: rows (1/N of every expert's rows; all slots are restored), experts "
        "(E/N whole experts at home, as without FSEP; only replicas of other ranks' experts "
        "move), or auto (the faster by the cost model)",
    )
    planner: str = _option(
        "greedy",
        "strategy that chooses layouts on rank 0 of the FSEP group: {strategies}; or random: a "
        "new random layout per microbatch, for tests",
    )
    split: Split = _option(
        Split.EXACT,
        "how a microbatch's tokens are split over an expert's replicas: exact (the largest "
        "rank load is minimal for the layout) or even (the paper's)",
    )
    plan_mode: PlanMode | None = _option(
        None,
        "what a microbatch is computed with: forecast (the planned layout), exact (a fresh "
        "one, made after the gate for its very counts: no rank above the mean), adaptive (per "
        "layer the cheaper of the two in predicted seconds), or announced (as exact, but made "
        "and restored ahead, for routing that is known before: Megatron's router replay, or "
        "megatron_laer.announce_routing); default adaptive, or "
        "forecast with a planner that makes no plans, --fsep-split even or --fsep-restore "
        "step",
    )
    imbalance_tolerance: float | None = _option(
        None,
        "adaptive takes the fresh layout where the planned one would load a rank with more "
        "than 1 + TOLERANCE times the mean, instead of deciding by cost",
        minimum=Bound(0, "0; 0.05 allows a rank 5 % above the mean"),
    )
    plan_lag: int = _option(
        1,
        "a plan made from the routing of step t takes effect at step t + LAG",
        minimum=Bound(1, "1; a plan cannot act on the step whose routing it was made from"),
        maximum=Bound(
            MAX_PLAN_LAG,
            f"{MAX_PLAN_LAG}; plans are kept in memory and in checkpoints for so many steps",
        ),
    )
    late_plan: LatePlan = _option(
        LatePlan.KEEP,
        "when a plan is not ready in time: keep the layouts in force and never wait, or wait "
        "(bitwise reproducible; implied by --deterministic-mode)",
    )
    restore: Restore = _option(
        Restore.LAYER,
        "how often experts are restored: layer (for each layer and microbatch, forward and "
        "backward: two layers in memory), or step (once per step, gradients exchanged once: "
        "all layers in memory; implies --fsep-plan-mode forecast)",
    )
    restore_memory_gib: float = _option(
        0.0,
        "memory of a rank in which restored weights stay from forward to backward, as many as fit",
        minimum=Bound(0, "0; 1.5 keeps 1.5 GiB"),
        maximum=Bound(4096, "4096; no card has more"),
    )
    scheduler: OverlapScheduler = _option(
        OverlapScheduler.ON,
        "on: restores and gradient exchanges run while the layers beside them compute; off: "
        "each is waited for at once",
    )
    node_size: int | None = _option(
        None,
        "ranks of the FSEP group per node G; default: as the launcher says (torchrun's "
        "LOCAL_WORLD_SIZE)",
        minimum=Bound(1, "1 rank"),
    )
    restore_algorithm: ExchangeAlgorithm | Auto = _option(
        Auto.AUTO,
        "how experts and their gradients cross nodes: flat (one All-to-All), node (each "
        "distinct expert of a node crosses once, then an exchange inside the node), or auto "
        "(the faster by the cost model)",
    )
    grad_wire_dtype: WireDtype | None = _option(
        None,
        "of gradients between nodes under --fsep-restore-algorithm node; default that of the "
        "weights",
    )
    token_exchange: TokenExchange | Auto = _option(
        TokenExchange.RANK,
        "how tokens travel to experts: rank (Megatron's All-to-All, a row per token and "
        "expert), node (a row per token and node, then one per rank inside the node; outputs "
        "are summed on the way back), or auto (the faster by the cost model)",
    )
    homes: str | None = _option(
        None,
        "file with the experts at home on each rank, by layer, for --fsep-sharding experts (which "
        "it implies); default: stock's placement",
    )
    gemm: GemmBackEnd = _option(
        GemmBackEnd.AUTO,
        "what multiplies the tokens of slots: loop (one torch.mm per slot), te (Transformer "
        "Engine's grouped GEMM), torch (torch's grouped_mm), or auto (loop, until another one is "
        "measured on the card)",
    )
    allow_unproven: tuple[Unproven, ...] = _option(
        (),
        "run what nobody has run yet: te-graphs (Transformer Engine's CUDA graphs of "
        "parts of layers, up to the counts), dense-fp8 (fp8 in all layers but the experts), "
        "fp8-experts (fp8 in all layers, with --fsep-sharding experts)",
    )
    cluster: str | None = _option(
        None,
        "hardware constants for the cost model: a name in configs/clusters or a path; default "
        "by the device's name",
    )
    record_layouts: str | None = _option(
        None,
        "directory to which every applied layout is recorded, one file per FSEP group",
    )
    record_trace: str | None = _option(
        None,
        "directory to which the routing of every microbatch is recorded, one file per FSEP "
        "group, for `megatron_laer plan`",
    )
    pairs_interval: int | None = _option(
        None,
        "with --fsep-record-trace, the interval in steps at which pairs of experts are recorded "
        "too; default: never",
        minimum=Bound(1, "1; 100 counts every hundredth step"),
    )
    sampled_sets: int | None = _option(
        None,
        "record with the pairs the experts of about so many tokens of each layer, as many of each "
        "rank; default: none",
        minimum=Bound(1, "1 token"),
        maximum=Bound(2**24, "16777216; no rank has more in a microbatch"),
    )
    record_metrics: str | None = _option(
        None,
        "directory to which the metrics of every step and layer are recorded, with measured "
        "times, one file per FSEP group, for `megatron_laer report`",
    )

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse values that contradict the preset, also those that are a field's default."""
        wanted = PRESETS.get(given.get("preset") or "", {})
        problems = [
            f"{flag_name(name)} {given[name]}: --fsep-preset {given['preset']} means "
            f"{flag_name(name)} {value}; leave one of them out"
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
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is not None or spec.default is not None:
                # Plain words become the members they name.
                object.__setattr__(self, spec.name, _checked(spec, value))
        if self.homes is not None and self.sharding == Auto.AUTO:
            object.__setattr__(self, "sharding", Sharding.EXPERTS)
        if problems := [*self._problems()]:
            raise ValueError(numbered(problems))

    def _problems(self) -> Iterator[str]:
        """Yield the combinations of settings that cannot work, with remedies."""
        if self.restore == Restore.STEP and self.mode != PlanMode.FORECAST:
            yield (
                f"--fsep-plan-mode {self.mode}: --fsep-restore {self.restore} keeps layouts for a "
                "step; remove one of them"
            )
        if self.split == Split.EVEN and self.mode != PlanMode.FORECAST:
            yield (
                f"--fsep-plan-mode {self.mode}: fresh layouts are made for exact splits, got "
                f"--fsep-split {self.split}; remove one of them"
            )
        if self.homes == "":
            yield "--fsep-homes '': the path is empty; give a file"
        if self.homes is not None and self.sharding == Sharding.ROWS:
            yield (
                f"--fsep-homes {quoted(self.homes)}: no expert has a home with --fsep-sharding "
                f"{self.sharding}; leave it out, or give --fsep-sharding {Sharding.EXPERTS}"
            )
        if self.sharding == Sharding.EXPERTS and self.reason_for_rows is not None:
            yield self.reason_for_rows
        if self.experts_in_fp8 and (problem := self._problem_with_fp8_experts()) is not None:
            yield f"--fsep-allow-unproven {Unproven.FP8_EXPERTS}: {problem}"
        if self.pairs_interval is not None and self.record_trace is None:
            yield (
                f"--fsep-pairs-interval {self.pairs_interval}: no effect, since "
                "--fsep-record-trace is not given; leave it out"
            )

    @property
    def reason_for_rows(self) -> str | None:
        """Return why these settings need `--fsep-sharding rows`; None if they do not."""
        if lays_out_freely(self.planner):
            return (
                f"--fsep-planner {self.planner}: moves every expert, so it does not run with "
                f"--fsep-sharding {Sharding.EXPERTS}; use another planner, or --fsep-sharding rows"
            )
        if Unproven.DENSE_FP8 in self.allow_unproven:
            return (
                f"--fsep-allow-unproven {Unproven.DENSE_FP8}: Transformer Engine would compute "
                f"home experts in fp8, unlike replicas, with --fsep-sharding {Sharding.EXPERTS}; "
                "use --fsep-sharding rows"
            )
        return None

    @property
    def experts_in_fp8(self) -> bool:
        return Unproven.FP8_EXPERTS in self.allow_unproven

    def _problem_with_fp8_experts(self) -> str | None:
        """Return why experts cannot compute in fp8 with these settings; None if they can."""
        if self.sharding == Sharding.ROWS:
            return (
                "rows of experts are kept and moved in the parameters' dtype; use --fsep-sharding "
                f"{Sharding.EXPERTS}"
            )
        if self.gemm not in (GemmBackEnd.AUTO, GemmBackEnd.LOOP):  # what `auto` becomes
            return f"--fsep-gemm {self.gemm} multiplies no fp8; leave it out"
        if Unproven.DENSE_FP8 in self.allow_unproven:
            return f"{Unproven.DENSE_FP8} would keep fp8 from the experts; give one of them"
        if self.sharding == Auto.AUTO and self.reason_for_rows is not None:
            return f"it needs --fsep-sharding {Sharding.EXPERTS}, but {self.reason_for_rows}"
        return None

    @property
    def mode(self) -> PlanMode:
        """Return the plan mode in force."""
        if self.plan_mode is not None:
            return self.plan_mode
        is_fixed = self.planner in FixedPlanner
        is_kept = self.split == Split.EVEN or self.restore == Restore.STEP
        return PlanMode.FORECAST if is_fixed or is_kept else PlanMode.ADAPTIVE

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


def lays_out_freely(planner: str) -> bool:
    """Return whether a planner leaves no expert at home: the paper's, or a variant."""
    return planner.split("-")[0] == LAER_PLANNER


def flag_name(field_name: str) -> str:
    """Return the flag of a field: `plan_lag` → `--fsep-plan-lag`."""
    return "--fsep-" + field_name.replace("_", "-")


def deterministic(config: FSEPConfig) -> FSEPConfig:
    """Return the config under Megatron's `--deterministic-mode`, which waits for plans."""
    return dataclasses.replace(config, late_plan=LatePlan.WAIT)


@cache
def _annotations() -> dict[str, Any]:
    """Return the fields' types, whose texts every start of a rank would evaluate many times."""
    return get_type_hints(FSEPConfig)


@cache
def types_of(name: str) -> tuple[type, ...]:
    """Return the types of a field's value, or of each of its values, except None."""
    annotation = _annotations()[name]
    members = get_args(annotation) or (annotation,)
    return tuple(kind for kind in members if kind not in (type(None), Ellipsis))


def words_of(name: str) -> tuple[str, ...]:
    """Return the words that a field chooses from; none for a number or any text."""
    return tuple(word.value for choice in _choices(name) for word in choice)


def _choices(name: str) -> tuple[type[Choice], ...]:
    return tuple(kind for kind in types_of(name) if issubclass(kind, Choice))


def takes_several(name: str) -> bool:
    """Return whether a field holds any number of its words."""
    return get_origin(_annotations()[name]) is tuple


def _word(name: str, value: Any) -> Choice:
    for choice in _choices(name):
        if isinstance(value, str) and value in choice:
            return choice(value)
    raise ValueError(f"{flag_name(name)} {value!r}: must be one of {', '.join(words_of(name))}")


def _checked(spec: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value in its field's type, or raise a ValueError that quotes it."""
    flag, kind = flag_name(spec.name), types_of(spec.name)[0]
    if takes_several(spec.name):
        given = value if isinstance(value, list | tuple) else [value]
        return tuple(
            sorted({_word(spec.name, word) for word in given})
        )  # in one order on all ranks
    if issubclass(kind, Choice):
        return _word(spec.name, value)
    if kind not in _NUMBERS:
        return value
    number, noun = _NUMBERS[kind]
    if not isinstance(value, number):
        raise ValueError(f"{flag} {value!r}: must be {noun}")
    minimum, maximum = spec.metadata["minimum"], spec.metadata["maximum"]
    # Written so that it also refuses NaN.
    if minimum is not None and not minimum.value <= value < math.inf:
        raise ValueError(f"{flag} {value}: must be at least {minimum.text}")
    if maximum is not None and value > maximum.value:
        raise ValueError(f"{flag} {value}: must be at most {maximum.text}")
    return value
