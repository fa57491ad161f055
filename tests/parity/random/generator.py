"""`draw(seed)` returns a legal combination of settings, the same for the same seed.

Stock Megatron and FSEP accept it: FSEP's own rules refuse other drafts. Nothing is run here.

Legend: N ranks of an FSEP group, E experts.
"""

from __future__ import annotations

import os
import random
import tempfile
from bisect import bisect_right
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_laer.cpu.training import Adapt
from megatron_laer.planner.homes_file import write_homes
from tests.parity.adapted import frozen_in_part, lora_on_attention
from tests.parity.bridge_lora import lora_on_experts_under_recompute
from tests.parity.random import settings
from tests.parity.random.rules import refusals
from tests.parity.random.settings import OF_FSEP, Choice, Setting
from tests.parity.row import Row

STEPS = 6
_Value = TypeVar("_Value")

_ADAPTS = {
    "LoRA on attention": lora_on_attention,
    "LoRA on experts": lora_on_experts_under_recompute,
    "frozen in part": frozen_in_part,
}
_APART = 10**6  # seeds of a case's drafts
# Their numbers depend on how many ranks have the data, or on each rank's random numbers.
_OF_RANKS = {
    "global aux loss",
    "all aux losses",
    "quantile balancing",
    "input jitter",
    "forced balance",
    "router replay",
    "evaluation",
}


@dataclass(frozen=True)
class Case:
    """Combination under test, with its features in order of drawing.

    `model_parallel` is the number of ranks that have the same data.
    """

    seed: int
    row: Row
    features: tuple[str, ...]
    model_parallel: int

    def has(self, *names: str) -> bool:
        assert settings.SETTINGS.keys() >= {*names}
        return not {*names}.isdisjoint(self.features)

    @property
    def chooses(self) -> bool:
        """Return True if routers choose by themselves and their choices can be replayed."""
        return not self.has("fused router", "router replay")

    def other_stock(self, data: str) -> tuple[int, list[str]] | None:
        """Return a stock run with other orders of sums, whose distance is the floor, or None.

        It places experts otherwise, or, if that is impossible, gives half of the ranks all data. In
        bf16 the latter changes none of the sums that FSEP reorders: products of few tokens.
        """
        flags = self.row.reference_flags or self.row.flags
        ranks, command = replace(self.row, flags=flags).other_stock(data)
        if self.row.stock_parallel[0] == self.row.stock_parallel[1]:
            ranks //= 2
            if ranks % self.model_parallel or self.has("bf16", *_OF_RANKS):
                return None
        return ranks, command

    @property
    def keeps_layouts(self) -> bool:
        """Return True if no price decides a layout, as prices depend on Megatron's schedule."""
        return self.has("random layouts", "random layouts, forecast", "static planner")

    def stock_in_schedule(self, data: str, *, plain: bool = False) -> tuple[int, list[str]]:
        """Return a stock run in the case's own schedule, which needs experts on several ranks."""
        most = max(self.row.stock_parallel)
        flags = settings.in_plain_schedule(self.row.flags) if plain else self.row.flags
        return replace(self.row, stock_parallel=(most, most), reference_flags=flags).reference(data)

    def plain_schedule(self, data: str) -> tuple[int, list[str]] | None:
        """Return FSEP's run in Megatron's plain schedule, or None if the case's own is that."""
        flags = settings.in_plain_schedule(self.row.flags)
        return None if flags == self.row.flags else replace(self.row, flags=flags).fsep_run(data)


class Draft:
    """Settings of a case drawn so far: features in order, flags of both sides and of FSEP alone.

    All draws come from `random()`, which gives the same numbers in every version of Python.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random
        self.features: list[str] = []
        self.flags = ""
        self.without = ""
        self.fsep = ""

    def has(self, *names: str) -> bool:
        return any(name in self.features for name in names)

    def pick(self, values: Sequence[_Value]) -> _Value:
        return values[int(self._random() * len(values))]

    def choose(self, table: Choice, *, but: Container[str] = ()) -> str:
        """Draw one of the settings that are legal here, `but` some."""
        legal = [name for name in table if name not in but and self._allows(table[name])]
        ends = list(accumulate(table[name].weight for name in legal))
        name = legal[bisect_right(ends, self._random() * ends[-1], hi=len(ends) - 1)]
        self.take(table, name)
        return name

    def option(self, table: Choice, name: str, *, legal: bool = True) -> bool:
        """Draw whether to add a setting, whose weight is its probability where it is legal."""
        setting = table[name]
        drawn = legal and self._allows(setting) and self._random() < setting.weight
        if drawn:
            self.take(table, name)
        return drawn

    def options(self, table: Choice, *, but: Container[str] = ()) -> list[str]:
        """Return the drawn ones of a table's settings."""
        return [name for name in table if self.option(table, name, legal=name not in but)]

    def _allows(self, setting: Setting) -> bool:
        return not self.has(*setting.never) and (not setting.needs or self.has(*setting.needs))

    def take(self, table: Choice, name: str) -> None:
        setting = table[name]
        self.features.append(name)
        self.without = f"{self.without} {setting.without}".strip()
        if setting.flags.startswith(OF_FSEP):
            self.fsep += setting.flags
        else:
            self.flags += setting.flags


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a case; `stock` are possible expert-parallel sizes of stock."""

    ranks: int
    pipeline: int
    model_parallel: int
    expert_parallel: int
    experts: int
    top_k: int
    accumulation: int

    @property
    def stock(self) -> list[int]:
        ranks = self.ranks // self.pipeline
        return [size for size in (1, 2, 4, 8) if not ranks % size and not self.experts % size]


def draw(seed: int, steps: int = STEPS) -> Case:
    """Return the case of a seed, with this many training steps."""
    drafts = (_draw(seed, Draft(first), steps) for first in count(seed, _APART))
    return next(case for case in drafts if not refusals(case.row) and not _never_ends(case))


def _never_ends(case: Case) -> bool:
    """Return True if a checkpoint of Megatron's returns a dense layer's bias.

    The bias is then a result of the checkpoint, whose backward runs itself again without end.
    """
    has_dense = case.has("first layer dense", "experts in every second layer", *settings.HYBRIDS)
    return has_dense and case.has("mlp") and case.has("linear bias")


def _draw(seed: int, draft: Draft, steps: int) -> Case:
    sizes = _draw_sizes(draft)
    adapt = _draw_model(draft, sizes)
    _draw_router(draft, sizes)
    _draw_recompute(draft)
    _draw_training(draft)
    capacity = _draw_fsep(draft, sizes)
    _draw_sharding(draft, sizes, capacity)
    _draw_schedule(draft)

    # Megatron's local layers cannot train an expert's bias with one expert-parallel rank.
    stock = [size for size in sizes.stock if size > 1 or not draft.has("linear bias")]
    reference = max([size for size in stock if size <= sizes.expert_parallel] or stock)
    other = max([size for size in stock if size != reference] or [reference])
    row = Row(
        f"random-{seed}",
        ranks=sizes.ranks,
        experts=sizes.experts,
        expert_parallel=sizes.expert_parallel,
        stock_parallel=(reference, other),
        accumulation=sizes.accumulation,
        flags=draft.flags,
        reference_flags=settings.of_reference(draft.flags),
        without=draft.without,
        capacity=capacity,
        fsep=draft.fsep,
        steps=steps,
        adapt=adapt,
        # In a pipeline, overlapped reduces leave parts of the first step's gradients.
        gradients=not (sizes.pipeline == 2 and "--overlap-grad-reduce" in draft.flags),
    )
    return Case(seed, row, tuple(draft.features), sizes.model_parallel)


def _draw_sizes(draft: Draft) -> _Sizes:
    ranks = int(draft.choose(settings.RANKS).split()[0])
    left = ranks
    for name, least in (("tensor parallel 2", 2), ("pipeline 2", 4), ("context parallel 2", 2)):
        if draft.option(settings.SIZES, name, legal=ranks >= least and left >= 2):
            left //= 2
    pipeline = 2 if draft.has("pipeline 2") else 1
    expert_parallel = draft.pick([size for size in (2, 4, 8) if ranks // pipeline % size == 0])
    if expert_parallel < ranks // pipeline:
        draft.take(settings.MARKS, settings.EXPERT_DATA)
    experts = int(draft.choose(settings.EXPERTS).split()[0])
    if experts % expert_parallel:
        draft.take(settings.MARKS, settings.UNEVEN)
    too_many = [name for name in settings.TOP_K if int(name[4:]) >= experts]
    draft.option(settings.RUN, "short sequences")
    return _Sizes(
        ranks,
        pipeline,
        model_parallel=ranks // left,
        expert_parallel=expert_parallel,
        experts=experts,
        top_k=int(draft.choose(settings.TOP_K, but=too_many)[4:]),
        accumulation=draft.pick((2, 4) if pipeline == 2 else (1, 2, 4)),
    )


def _draw_model(draft: Draft, sizes: _Sizes) -> Adapt | None:
    if draft.choose(settings.STACKS) not in settings.HYBRIDS:
        layers = draft.pick((2, 4) if sizes.pipeline == 2 else (2, 2, 3, 4))
        if draft.option(settings.SIZES, "virtual pipeline"):
            layers = 4
        draft.flags += f" --num-layers {layers}"
        if draft.has("first layer dense"):
            draft.flags += f" --moe-layer-freq ([0]*1+[1]*{layers - 1})"
    draft.choose(settings.ACTIVATIONS)
    draft.options(settings.MODEL, but=() if max(sizes.stock) > 1 else {"linear bias"})
    return next((adapt for name, adapt in _ADAPTS.items() if draft.has(name)), None)


def _draw_router(draft: Draft, sizes: _Sizes) -> None:
    # Quantiles need as many assignments of a microbatch for each expert.
    tokens = 32 if draft.has("short sequences") else 96
    is_uneven = tokens * sizes.top_k % sizes.experts > 0
    draft.choose(settings.BALANCING, but={"quantile balancing"} if is_uneven else set())
    # A single probability is 1 and has no gradient, unless softmax comes before top-k.
    is_constant = sizes.top_k == 1 and not draft.has("sinkhorn")
    draft.choose(settings.SCORES, but={"softmax"} if is_constant else set())
    groups = _groups(sizes)
    for name in settings.ROUTER:
        has_groups = name != "groups of experts" or len(groups) > 0
        if draft.option(settings.ROUTER, name, legal=has_groups) and name == "groups of experts":
            number, chosen = draft.pick(groups)
            draft.flags += f" --moe-router-num-groups {number} --moe-router-group-topk {chosen}"
    draft.choose(settings.ROUTER_DTYPES)


def _groups(sizes: _Sizes) -> list[tuple[int, int]]:
    """Return legal pairs: number of groups of experts, and groups that a token chooses."""
    return [
        (number, chosen)
        for number in (2, 3, 4)
        for chosen in (1, 2)
        if sizes.experts % number == 0
        and sizes.experts > number >= chosen
        and sizes.top_k > 1
        and sizes.top_k % chosen == 0
        and sizes.top_k <= chosen * (sizes.experts // number)
    ]


def _draw_recompute(draft: Draft) -> None:
    kind = draft.choose(settings.RECOMPUTE)
    if kind not in settings.IN_PARTS:
        return
    parts = draft.options(settings.PARTS)
    flags = settings.RECOMPUTE_PARTS
    if kind == "recompute of parts":
        draft.flags += flags + " ".join(parts or ["core_attn"])
    else:  # stock's own needs Transformer Engine, so stock recomputes nothing
        draft.fsep += " --moe-grouped-gemm" + flags + " ".join([*parts, "moe_act"])


def _draw_training(draft: Draft) -> None:
    precision = draft.choose(settings.PRECISIONS)
    draft.option(settings.RUN, "gradients in bf16")
    draft.choose(settings.FP8)
    but: tuple[str, ...] = ()
    if draft.choose(settings.OPTIMIZERS) == "Muon":
        draft.flags += settings.MUON[precision]
        but = settings.NOT_FOR_MUON_IN_FP32 if precision == "fp32" else ()
    sharding = draft.choose(settings.SHARDING, but=but)
    is_kept = draft.has(*settings.IN_FP8) and precision == "bf16" and "both overlaps" in sharding
    if draft.option(settings.RUN, "experts kept in fp8", legal=is_kept) and draft.has("mxfp8"):
        draft.flags += " --reuse-grad-buf-for-mxfp8-param-ag"
    draft.option(settings.RUN, "per-token loss")
    draft.option(settings.RUN, "evaluation")


def _draw_fsep(draft: Draft, sizes: _Sizes) -> int | None:
    """Draw FSEP's own settings, and return its capacity, or None for the default."""
    mode = draft.choose(settings.MODES)
    if mode in settings.PLANS:
        draft.choose(settings.PLANNERS)
    if mode == "adaptive":
        draft.choose(settings.TOLERANCES)
    draft.options(settings.FSEP)
    if draft.has("restore by nodes", "tokens by nodes"):
        draft.choose(settings.NODES, but={"nodes of 4"} if sizes.expert_parallel % 4 else ())
    draft.option(settings.FSEP_LATER, "fp32 gradients between nodes")
    draft.choose(settings.GRAPHS)
    needed = {"te-graphs": settings.GRAPHED, "fp8-experts": settings.IN_FP8}
    if allowed := [word for word, features in needed.items() if draft.has(*features)]:
        draft.fsep += f" --fsep-allow-unproven {' '.join(allowed)}"

    but = set[str]()
    if draft.has("bf16", "fp64 router") and not draft.has("fp32 router"):
        # Their probabilities are in fp32, and those of the reference in the router's dtype.
        but = {"DeepEP", "HybridEP"}
    ranks, fewest = sizes.expert_parallel, -(-sizes.experts // sizes.expert_parallel)
    capacities = range(fewest, sizes.experts + 1)
    in_fours = [slots for slots in capacities if slots * ranks % 4 == 0]
    if not in_fours:
        but.add("HybridEP")
    if draft.choose(settings.DISPATCHERS, but=but) == "HybridEP":
        return draft.pick(in_fours)
    is_given = draft.option(settings.FSEP_LATER, "given capacity")
    return draft.pick(capacities) if is_given else None


def _draw_sharding(draft: Draft, sizes: _Sizes, capacity: int | None) -> None:
    home_slots = sizes.experts // sizes.expert_parallel
    but = {"experts at home"} if capacity == home_slots else set()
    if draft.choose(settings.EXPERT_SHARDING, but=but) == "experts at home":
        draft.option(settings.FSEP_LATER, "replicas that pay")
        if draft.option(settings.HOMES, "permuted homes"):
            draft.fsep += f" --fsep-homes {_homes(sizes)}"


def _draw_schedule(draft: Draft) -> None:
    """Draw Megatron's schedule by parts of layers, and when weight gradients are computed."""
    but = set[str]()
    illegal = (
        # Megatron cuts a chunk alone into parts, and on the CPU masks need one stage.
        draft.has("pipeline 2") and not draft.has("virtual pipeline"),
        draft.has("pipeline 2") and draft.has("context parallel 2"),
        # Only layers with experts predict in parts.
        draft.has("multi-token prediction") and draft.has("experts in every second layer"),
        # The norm before the router is in its graph, and Megatron would discard its output outside.
        draft.has("layernorm") and draft.has("graphs of router and counts"),
    )
    if any(illegal):
        but.add("combined 1F1B")
    for name in settings.SCHEDULE:
        # Graphs of the router have shared experts, whose gradients must then stay in one place.
        if draft.has("shared experts") and draft.has(*settings.GRAPHED):
            but |= set() if draft.has("fused weight gradients") else {"delayed weight gradients"}
        draft.option(settings.SCHEDULE, name, legal=name not in but)


def _homes(sizes: _Sizes) -> Path:
    """Write homes of all layers that a case may have, and return the file."""
    ranks, experts = sizes.expert_parallel, sizes.experts
    rng = np.random.default_rng((ranks, experts))
    names = [f"{kind} {number}" for kind in ("layer", "mtp") for number in range(1, 13)]
    names += [f"{name} #{number}" for name in names for number in (2, 3)]
    # Other workers and checkouts have files of their own, since ranks read while they would write.
    path = Path(tempfile.gettempdir()) / f"homes-of-{experts}-on-{ranks}-{os.getpid()}.json"
    write_homes(path, ranks, {name: rng.permutation(experts) for name in names})
    return path
