"""`draw(seed)` returns a legal combination of settings, the same for the same seed.

Stock Megatron and FSEP accept it: FSEP's own rules refuse other drafts. Nothing is run here.

Legend: N ranks of an FSEP group, E experts.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np

from megatron_laer.cpu.training import Adapt
from megatron_laer.planner.homes_file import write_homes
from tests.parity.adapted import frozen_in_part, lora_on_attention
from tests.parity.bridge_lora import lora_on_experts_under_recompute
from tests.parity.random import settings
from tests.parity.random.draft import Draft
from tests.parity.random.rules import refusals
from tests.parity.random.settings import Setting
from tests.parity.row import BF16_BOUND, FP8_BOUND, FP32_BOUND, LION_BOUND, Row

STEPS = 6

_UNEVEN = "N does not divide E"
_EXPERT_DATA = "expert data parallel"
_NODES = {size: f"nodes of {size}" for size in (1, 2, 4)}
_TABLES = [
    table
    for table in vars(settings).values()
    if isinstance(table, dict) and all(isinstance(item, Setting) for item in table.values())
]
FEATURES = {name for table in _TABLES for name in table} | {_UNEVEN, _EXPERT_DATA, *_NODES.values()}
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
        assert FEATURES.issuperset(names)
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
    return next(case for case in drafts if not refusals(case.row))


def _draw(seed: int, draft: Draft, steps: int) -> Case:
    sizes = _draw_sizes(draft)
    adapt = _draw_model(draft, sizes)
    _draw_router(draft, sizes)
    _draw_recompute(draft)
    _draw_training(draft)
    capacity = _draw_fsep(draft, sizes)
    _draw_sharding(draft, sizes, capacity)

    # Megatron's local layers cannot train an expert's bias with one expert-parallel rank.
    stock = [size for size in sizes.stock if size > 1 or not draft.has("linear bias")]
    reference = max([size for size in stock if size <= sizes.expert_parallel] or stock)
    other = max([size for size in stock if size != reference] or [reference])
    bound = LION_BOUND if draft.has("Lion") else FP32_BOUND
    bound = BF16_BOUND if draft.has("bf16") else bound
    row = Row(
        f"random-{seed}",
        f"random {seed}",
        ranks=sizes.ranks,
        experts=sizes.experts,
        expert_parallel=sizes.expert_parallel,
        stock_parallel=(reference, other),
        accumulation=sizes.accumulation,
        flags=draft.flags,
        reference_flags=settings.without_fsdp(draft.flags),
        without=draft.without,
        capacity=capacity,
        fsep=draft.fsep,
        bound=FP8_BOUND if draft.has(*settings.IN_FP8) else bound,
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
        draft.take(_EXPERT_DATA)
    experts = int(draft.choose(settings.EXPERTS).split()[0])
    if experts % expert_parallel:
        draft.take(_UNEVEN)
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
    in_pipeline = sizes.pipeline == 2
    hybrids = {name for name in settings.STACKS if name.startswith("HybridModel")}
    other_hybrids = {name for name in hybrids if ("pipeline" in name) != in_pipeline}
    is_hybrid = draft.choose(settings.STACKS, but=other_hybrids) in hybrids
    if not is_hybrid:
        layers = draft.pick((2, 4) if in_pipeline else (2, 2, 3, 4))
        if draft.option(settings.SIZES, "virtual pipeline", legal=in_pipeline):
            layers = 4
        draft.flags += f" --num-layers {layers}"
        if draft.has("first layer dense"):
            draft.flags += f" --moe-layer-freq ([0]*1+[1]*{layers - 1})"
    draft.choose(settings.ACTIVATIONS)

    def option(name: str, legal: bool = True) -> bool:
        return draft.option(settings.MODEL, name, legal=legal)

    if option("shared experts"):
        option("shared experts' gate")
        option("overlapped shared experts")
    has_bias = option("linear bias", not draft.has("shared experts") and max(sizes.stock) > 1)
    option("latent MoE", not has_bias and not draft.has("overlapped shared experts"))
    predicts = (
        not is_hybrid
        and not in_pipeline
        and (option("multi-token prediction") or option("repeated multi-token prediction"))
    )
    is_tied = option("tied embeddings")
    is_latent = option(
        "latent attention", not is_hybrid and not has_bias and not draft.has("context parallel 2")
    )
    if not is_latent:
        option("grouped queries")
        option("normalised queries")
    # Adaptation functions name the parts of a plain model.
    changes = not (is_hybrid or in_pipeline or has_bias or predicts or is_tied or is_latent)
    if option("LoRA on attention", changes and not draft.has("tensor parallel 2")):
        return lora_on_attention
    if option("LoRA on experts", changes):
        return lora_on_experts_under_recompute
    return frozen_in_part if option("frozen in part", changes) else None


def _draw_router(draft: Draft, sizes: _Sizes) -> None:
    # Quantiles need as many assignments of a microbatch for each expert.
    tokens = 32 if draft.has("short sequences") else 96
    is_uneven = tokens * sizes.top_k % sizes.experts > 0
    balancing = draft.choose(settings.BALANCING, but={"quantile balancing"} if is_uneven else set())
    if balancing == "sinkhorn":
        but = {*settings.SCORES} - {"softmax"}
    else:  # a single probability is 1 and has no gradient, unless softmax comes before top-k
        but = {"softmax"} if sizes.top_k == 1 else set()
    score = draft.choose(settings.SCORES, but=but)

    def option(name: str, legal: bool = True) -> bool:
        return draft.option(settings.ROUTER, name, legal=legal)

    is_plain = balancing not in ("sinkhorn", "quantile balancing")
    option("z loss", balancing not in ("all aux losses", "sinkhorn"))
    option("expert bias", is_plain and not score.startswith("softmax"))
    groups = _groups(sizes)
    if option("groups of experts", is_plain and len(groups) > 0):
        number, chosen = draft.pick(groups)
        draft.flags += f" --moe-router-num-groups {number} --moe-router-group-topk {chosen}"
    option("scaled probabilities")
    option("probabilities on input", sizes.top_k == 1)
    option("input jitter")
    option("forced balance")
    # The others' fused kernels need Transformer Engine.
    option(
        "fused router",
        is_plain and score != "square-root softplus" and not draft.has("expert bias"),
    )
    option("fused permutation")
    option("router replay", not draft.has(*settings.NOT_GIVEN))
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
    # A checkpoint whose input needs no gradient is not run again.
    is_frozen = draft.has("LoRA on attention", "LoRA on experts", "frozen in part")
    but = {"full recompute", "recompute by block"} if is_frozen else set()
    kind = draft.choose(settings.RECOMPUTE, but=but)
    if kind not in settings.IN_PARTS:
        return
    of_activation = kind != "recompute of parts"
    legal = {
        "layernorm": not is_frozen,
        "mlp": not of_activation,
        "moe": not of_activation and not is_frozen,
        "shared_experts": draft.has("shared experts")
        and not draft.has("overlapped shared experts")
        and not of_activation,
        "mla_up_proj": draft.has("latent attention"),
    }
    parts = [
        name
        for name in settings.PARTS
        if draft.option(settings.PARTS, name, legal=legal.get(name, True))
    ]
    if of_activation:  # stock's own needs Transformer Engine, so stock recomputes nothing
        parts.append("moe_act")
        draft.fsep += " --moe-grouped-gemm"
    flags = settings.RECOMPUTE_PARTS + " ".join(parts or ["core_attn"])
    if of_activation:
        draft.fsep += flags
    else:
        draft.flags += flags


def _draw_training(draft: Draft) -> None:
    precision = draft.choose(settings.PRECISIONS)
    draft.option(settings.RUN, "gradients in bf16", legal=precision == "bf16")
    # Adapters of experts are found when layers are built, after the rules were asked.
    draft.choose(settings.FP8, but=settings.IN_FP8 if draft.has("LoRA on experts") else set())
    # Combinations that stock's optimizers do not support.
    with_fsdp = {name for name in settings.SHARDING if "FSDP" in name}
    sharded = {*settings.SHARDING} - {"whole optimizer", "overlapped reduce"}
    has_lora = draft.has("LoRA on attention", "LoRA on experts")
    but = {
        "Adam": with_fsdp if draft.has("LoRA on experts") else set(),  # refused
        "SGD": sharded,
        "Lion": {*settings.SHARDING} - {"whole optimizer"},
        "Muon": {"overlapped reduce", *(sharded if precision == "fp32" else with_fsdp)},
    }
    optimizer = draft.choose(settings.OPTIMIZERS, but={"Muon"} if has_lora else set())
    if optimizer == "Muon":
        draft.flags += settings.MUON[precision]
    sharding = draft.choose(settings.SHARDING, but=but[optimizer])
    is_kept = draft.has(*settings.IN_FP8) and precision == "bf16" and "both overlaps" in sharding
    if draft.option(settings.RUN, "experts kept in fp8", legal=is_kept) and draft.has("mxfp8"):
        draft.flags += " --reuse-grad-buf-for-mxfp8-param-ag"
    draft.option(settings.RUN, "per-token loss")
    draft.option(settings.RUN, "evaluation", legal=not draft.has("router replay"))


def _draw_fsep(draft: Draft, sizes: _Sizes) -> int | None:
    """Draw FSEP's own settings, and return its capacity, or None for the default."""

    def option(name: str, legal: bool = True) -> bool:
        return draft.option(settings.FSEP, name, legal=legal, alone=True)

    but = set() if draft.has("router replay") else {"announced"}
    mode = draft.choose(settings.MODES, but=but, alone=True)
    plans = mode in ("forecast", "adaptive")
    if plans:
        draft.choose(settings.PLANNERS, alone=True)
    if mode == "adaptive":
        draft.choose(settings.TOLERANCES, alone=True)
    option("restored once per step", mode in ("random layouts, forecast", "forecast"))
    option("older counts", plans)
    option("late plans waited for", plans)
    option("scheduler off")
    option("even split", mode not in ("exact", "adaptive", "announced"))
    option("products by grouped_mm", not draft.has("LoRA on experts"))  # too narrow for it

    experts_by_nodes = option("restore by nodes")
    if not experts_by_nodes:
        option("flat restore")
    tokens_by_nodes = option("tokens by nodes", not draft.has("fused permutation"))
    if experts_by_nodes or tokens_by_nodes:
        size = draft.pick([size for size in _NODES if sizes.expert_parallel % size == 0])
        draft.take(_NODES[size])
        draft.fsep += f" --fsep-node-size {size}"
    option("fp32 gradients between nodes", experts_by_nodes)
    draft.choose(settings.GRAPHS, but=_not_graphed(draft), alone=True)
    needed = {"te-graphs": settings.GRAPHED, "fp8-experts": settings.IN_FP8}
    if allowed := [word for word, features in needed.items() if draft.has(*features)]:
        draft.fsep += f" --fsep-allow-unproven {' '.join(allowed)}"

    but = {"DeepEP", "HybridEP"} if tokens_by_nodes else set()
    if draft.has("bf16", "fp64 router") and not draft.has("fp32 router"):
        # Their probabilities are in fp32, and those of the reference in the router's dtype.
        but |= {"DeepEP", "HybridEP"}
    ranks, fewest = sizes.expert_parallel, -(-sizes.experts // sizes.expert_parallel)
    capacities = range(fewest, sizes.experts + 1)
    in_fours = [slots for slots in capacities if slots * ranks % 4 == 0]
    if not in_fours:
        but.add("HybridEP")
    if draft.choose(settings.DISPATCHERS, but=but, alone=True) == "HybridEP":
        return draft.pick(in_fours)
    return draft.pick(capacities) if option("given capacity") else None


def _not_graphed(draft: Draft) -> set[str]:
    """Return the graphs that Megatron cannot capture."""
    if draft.has("full recompute", "recompute by block", *settings.NEVER_IN_GRAPHS):
        return settings.GRAPHED
    if draft.has("recompute of the MoE layer", "moe", *settings.NOT_IN_GRAPHS_OF_ROUTER):
        return settings.GRAPHED - {"graphs of attention"}
    return set()


def _draw_sharding(draft: Draft, sizes: _Sizes, capacity: int | None) -> None:
    home_slots = sizes.experts // sizes.expert_parallel
    needs_rows = draft.has(_UNEVEN, "planner laer")
    but = {"experts at home"} if needs_rows or capacity == home_slots else set()
    if draft.choose(settings.EXPERT_SHARDING, but=but, alone=True) == "experts at home":
        plans = draft.has("forecast", "exact", "adaptive", "announced")
        draft.option(settings.FSEP, "replicas that pay", legal=plans, alone=True)
        if draft.option(settings.HOMES, "permuted homes", legal=not draft.has("LoRA on experts")):
            draft.fsep += f" --fsep-homes {_homes(sizes)}"


def _homes(sizes: _Sizes) -> Path:
    """Write homes of all layers that a case may have, and return the file."""
    ranks, experts = sizes.expert_parallel, sizes.experts
    rng = np.random.default_rng((ranks, experts))
    names = [f"{kind} {number}" for kind in ("layer", "mtp") for number in range(1, 13)]
    names += [f"{name} #{number}" for name in names for number in (2, 3)]
    path = Path(tempfile.gettempdir()) / f"homes-of-{experts}-on-{ranks}.json"
    write_homes(path, ranks, {name: rng.permutation(experts) for name in names})
    return path
