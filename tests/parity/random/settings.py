"""Settings that random cases are made of: features with their weight, flags and legal partners.

Options are drawn in the order of their tables. `generator.py` has conditions on sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_laer.rules import STRATEGIES
from tests.parity import rows
from tests.parity.row import AT_HOME, REPLICAS_PAY


@dataclass(frozen=True)
class Setting:
    """Feature that a case may have.

    Attributes:
        weight: of a choice, relative to the others; of an option, its probability.
        flags: of both sides, or of FSEP alone where these begin as in `OF_FSEP`.
        without: switches of the model that neither side gets.
        needs: features of which the case has one already.
        never: features of which the case has none yet.
    """

    weight: float
    flags: str = ""
    without: str = ""
    needs: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


Choice = dict[str, Setting]

OF_FSEP = " --fsep", " --cuda-graph", " --moe-token-dispatcher"
RANKS: Choice = {"2 ranks": Setting(4), "4 ranks": Setting(6), "8 ranks": Setting(1)}
SIZES: Choice = {
    "tensor parallel 2": Setting(0.25, rows.TENSOR),
    "pipeline 2": Setting(0.4, rows.PIPELINE),
    "context parallel 2": Setting(0.2, rows.CONTEXT),
    "virtual pipeline": Setting(
        0.5, " --num-layers-per-virtual-pipeline-stage 1", needs=("pipeline 2",)
    ),
}
# By number of experts; several are no multiple of a group's ranks.
EXPERTS: Choice = {
    f"{experts} experts": Setting(3 if experts == 8 else 1) for experts in (3, 4, 5, 6, 8, 12)
}
TOP_K: Choice = {
    f"top-{count}": Setting(weight, f" --moe-router-topk {count}")
    for count, weight in ((1, 2), (2, 4), (3, 2), (4, 2))
}

STACKS: Choice = {
    "every layer has experts": Setting(7),
    "experts in every second layer": Setting(1, " --moe-layer-freq 2"),
    "first layer dense": Setting(1, " --moe-ffn-hidden-size 32"),
    "HybridModel": Setting(0.7, rows.HYBRID + "*E-*E", never=("pipeline 2",)),
    "HybridModel with multi-token prediction": Setting(0.3, rows.HYBRID_MTP, never=("pipeline 2",)),
    "HybridModel in a pipeline": Setting(0.5, rows.HYBRID + "*E|*E-", needs=("pipeline 2",)),
    "HybridModel in a virtual pipeline": Setting(
        0.5, rows.HYBRID + "*E|E-|*E|-E/*E/*E", needs=("pipeline 2",)
    ),
}
HYBRIDS = tuple(name for name in STACKS if name.startswith("HybridModel"))
ACTIVATIONS: Choice = {
    "SwiGLU": Setting(6),
    "squared ReLU": Setting(1, " --squared-relu", "--swiglu"),
    "GELU": Setting(1, "", "--swiglu"),
    "clamped quick-GEGLU": Setting(1, rows.CLAMPED_GEGLU, "--swiglu"),
}
_SHARED = ("shared experts",)
_PREDICTS = ("multi-token prediction", "repeated multi-token prediction")
# Adaptation functions name the parts of a plain model.
_NOT_ADAPTED = (
    *(*HYBRIDS, "pipeline 2", "linear bias", *_PREDICTS, "tied embeddings", "latent attention"),
    *("LoRA on attention", "LoRA on experts"),
)
MODEL: Choice = {
    "shared experts": Setting(0.4, " --moe-shared-expert-intermediate-size 32"),
    "shared experts' gate": Setting(0.4, " --moe-shared-expert-gate", needs=_SHARED),
    "overlapped shared experts": Setting(0.5, " --moe-shared-expert-overlap", needs=_SHARED),
    "linear bias": Setting(0.15, "", rows.NO_BIAS, never=_SHARED),
    "latent MoE": Setting(
        0.12, " --moe-latent-size 32", never=("linear bias", "overlapped shared experts")
    ),
    "multi-token prediction": Setting(0.15, " --mtp-num-layers 1", never=(*HYBRIDS, "pipeline 2")),
    "repeated multi-token prediction": Setting(
        0.08, rows.REPEATED + "2", never=(*HYBRIDS, "pipeline 2", "multi-token prediction")
    ),
    "tied embeddings": Setting(0.2, "", rows.UNTIED),
    "latent attention": Setting(
        0.08,
        rows.LATENT_ATTENTION + " --rope-type rope",
        never=(*HYBRIDS, "linear bias", "context parallel 2"),
    ),
    "grouped queries": Setting(0.25, rows.GROUPED_QUERIES, never=("latent attention",)),
    "normalised queries": Setting(0.15, " --qk-layernorm", never=("latent attention",)),
    "LoRA on attention": Setting(0.3, never=(*_NOT_ADAPTED, "tensor parallel 2")),
    "LoRA on experts": Setting(0.6, never=_NOT_ADAPTED),
    "frozen in part": Setting(0.05, never=_NOT_ADAPTED),
}
_FROZEN = ("LoRA on attention", "LoRA on experts", "frozen in part")

SCORES: Choice = {
    "softmax": Setting(4),
    "softmax before top-k": Setting(1, " --moe-router-pre-softmax", never=("sinkhorn",)),
    "sigmoid": Setting(4, " --moe-router-score-function sigmoid", never=("sinkhorn",)),
    "square-root softplus": Setting(
        1, " --moe-router-score-function sqrtsoftplus", never=("sinkhorn",)
    ),
}
_COEFFICIENT = " --moe-aux-loss-coeff 1e-2"
BALANCING: Choice = {
    "no balancing": Setting(3),
    "aux loss": Setting(3, rows.AUX_LOSS + _COEFFICIENT),
    "sequence aux loss": Setting(
        2, " --moe-router-load-balancing-type seq_aux_loss" + _COEFFICIENT
    ),
    "global aux loss": Setting(
        2, " --moe-router-load-balancing-type global_aux_loss" + _COEFFICIENT
    ),
    "all aux losses": Setting(2, rows.AUX_LOSSES),
    "sinkhorn": Setting(0.7, " --moe-router-load-balancing-type sinkhorn"),
    "quantile balancing": Setting(
        0.9,
        " --moe-router-load-balancing-type quantile_balancing"
        " --moe-router-quantile-balancing-ema 0.5",
    ),
}
# Given choices are of all experts, once for each layer and microbatch of training.
NOT_GIVEN = (
    "sinkhorn",
    "quantile balancing",
    "forced balance",
    "fused router",
    "virtual pipeline",
    "multi-token prediction",
    "repeated multi-token prediction",
    "HybridModel with multi-token prediction",
    "HybridModel in a virtual pipeline",
    "evaluation",
)
_NOT_PLAIN = ("sinkhorn", "quantile balancing")
ROUTER: Choice = {
    "z loss": Setting(0.2, " --moe-z-loss-coeff 1e-3", never=("all aux losses", "sinkhorn")),
    "expert bias": Setting(
        0.6,
        " --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2",
        never=(*_NOT_PLAIN, "softmax", "softmax before top-k"),
    ),
    "groups of experts": Setting(0.4, never=_NOT_PLAIN),
    "scaled probabilities": Setting(0.25, " --moe-router-topk-scaling-factor 2.5"),
    "probabilities on input": Setting(0.3, " --moe-apply-probs-on-input", needs=("top-1",)),
    "input jitter": Setting(0.1, " --moe-input-jitter-eps 1e-1"),
    "forced balance": Setting(0.1, " --moe-router-force-load-balancing"),
    # The others' fused kernels need Transformer Engine.
    "fused router": Setting(
        0.08, " --moe-router-fusion", never=(*_NOT_PLAIN, "square-root softplus", "expert bias")
    ),
    "fused permutation": Setting(0.08, " --moe-permute-fusion"),
    "router replay": Setting(0.4, rows.REPLAY, never=NOT_GIVEN),
}
ROUTER_DTYPES: Choice = {
    "router in the model's dtype": Setting(6),
    "fp32 router": Setting(2, " --moe-router-dtype fp32"),
    "fp64 router": Setting(2, " --moe-router-dtype fp64"),
}

# A checkpoint whose input needs no gradient is not run again.
RECOMPUTE: Choice = {
    "no recompute": Setting(4),
    "full recompute": Setting(2, rows.FULL_RECOMPUTE, never=_FROZEN),
    "recompute by block": Setting(1, rows.BLOCK_RECOMPUTE, never=_FROZEN),
    "recompute of the MoE layer": Setting(2, rows.MOE_RECOMPUTE),
    "recompute of parts": Setting(1.5),
    "recompute of the experts' activation": Setting(2),
}
_OF_ACTIVATION = ("recompute of the experts' activation",)
IN_PARTS = ("recompute of parts", *_OF_ACTIVATION)
RECOMPUTE_PARTS = " --recompute-granularity selective --recompute-modules "
PARTS: Choice = {
    "core_attn": Setting(0.6),
    "layernorm": Setting(0.6, never=_FROZEN),
    "mlp": Setting(0.6, never=_OF_ACTIVATION),
    "shared_experts": Setting(
        0.8, needs=_SHARED, never=("overlapped shared experts", *_OF_ACTIVATION)
    ),
    "mla_up_proj": Setting(0.8, needs=("latent attention",)),
    "moe": Setting(0.4, never=(*_FROZEN, *_OF_ACTIVATION)),
}

PRECISIONS: Choice = {"fp32": Setting(7), "bf16": Setting(3, " --bf16")}
# Adapters of experts are found when layers are built, after the rules were asked.
_ADAPTED = ("LoRA on experts",)
FP8: Choice = {
    "no fp8": Setting(3),
    "fp8 per tensor": Setting(1, rows.FP8, never=_ADAPTED),
    "fp8 by blocks": Setting(1, rows.BLOCKS, never=_ADAPTED),
    "mxfp8": Setting(1, rows.MXFP8, never=_ADAPTED),
}
IN_FP8 = {*FP8} - {"no fp8"}
OPTIMIZERS: Choice = {
    "Adam": Setting(8),
    "SGD": Setting(0.7, " --optimizer sgd --sgd-momentum 0.9 --lr 1e-1 --min-lr 1e-1"),
    "Lion": Setting(0.4, " --optimizer lion"),
    "Muon": Setting(0.7, never=("LoRA on attention", "LoRA on experts")),
}
# Megatron's default multiplies in bf16, whose rounding would hide other differences.
MUON = {"fp32": rows.MUON, "bf16": " --optimizer muon --muon-extra-scale-factor 0.5"}
# Stock's optimizers do not support the others.
SHARDING: Choice = {
    "whole optimizer": Setting(3),
    "overlapped reduce": Setting(1, " --overlap-grad-reduce", never=("Lion", "Muon")),
    "distributed optimizer": Setting(2, " --use-distributed-optimizer", never=("SGD", "Lion")),
    "distributed optimizer, both overlaps": Setting(4, rows.DIST_OPT, never=("SGD", "Lion")),
    **{
        f"Megatron-FSDP, {name}": Setting(
            1.5, rows.FSDP + name, never=("LoRA on experts", "SGD", "Lion", "Muon")
        )
        for name in STRATEGIES
    },
}
NOT_FOR_MUON_IN_FP32 = ("distributed optimizer", "distributed optimizer, both overlaps")
RUN: Choice = {
    "gradients in bf16": Setting(0.3, " --grad-reduce-in-bf16", needs=("bf16",)),
    "per-token loss": Setting(0.15, rows.PER_TOKEN),
    "short sequences": Setting(0.15, " --seq-length 16 --max-position-embeddings 16"),
    "evaluation": Setting(0.15, " --eval-interval 3 --eval-iters 1", never=("router replay",)),
    "experts kept in fp8": Setting(0.5, " --fp8-param-gather"),
}

# FSEP's own; `announced` also has a flag of both sides.
MODES: Choice = {
    "random layouts": Setting(3, rows.RANDOM),
    "random layouts, forecast": Setting(1, rows.RANDOM + " --fsep-plan-mode forecast"),
    "forecast": Setting(2, " --fsep-plan-mode forecast"),
    "exact": Setting(2, " --fsep-plan-mode exact"),
    "adaptive": Setting(2, " --fsep-plan-mode adaptive"),
    "announced": Setting(4, rows.ANNOUNCED, needs=("router replay",)),
    "static planner": Setting(0.6, " --fsep-planner static"),
}
PLANS = ("forecast", "adaptive")
PLANNERS: Choice = {
    f"planner {name}": Setting(1, f" --fsep-planner {name}", needs=PLANS)
    for name in ("greedy", "laer")
}
FSEP: Choice = {
    "restored once per step": Setting(
        0.35, rows.STEP, needs=("random layouts, forecast", "forecast")
    ),
    "older counts": Setting(0.4, " --fsep-set plan_lag=3", needs=PLANS),
    "late plans waited for": Setting(0.5, " --fsep-late-plan wait", needs=PLANS),
    "scheduler off": Setting(0.2, " --fsep-set scheduler=off"),
    "even split": Setting(0.3, " --fsep-set split=even", never=("exact", "adaptive", "announced")),
    # Adapters are too narrow for it.
    "products by grouped_mm": Setting(0.25, " --fsep-set gemm=torch", never=_ADAPTED),
    "restore by nodes": Setting(0.35, " --fsep-set restore_algorithm=node"),
    "flat restore": Setting(0.3, " --fsep-set restore_algorithm=flat", never=("restore by nodes",)),
    "tokens by nodes": Setting(0.35, " --fsep-token-exchange node", never=("fused permutation",)),
}
# Drawn once nodes, capacity and sharding are.
FSEP_LATER: Choice = {
    "fp32 gradients between nodes": Setting(
        0.3, " --fsep-set grad_wire_dtype=fp32", needs=("restore by nodes",)
    ),
    "given capacity": Setting(0.5),
    "replicas that pay": Setting(
        0.8,
        f" --fsep-set cluster={REPLICAS_PAY}",
        needs=("forecast", "exact", "adaptive", "announced"),
    ),
}
_WARMED_UP = " --cuda-graph-warmup-steps 1" + rows.GRAPHED
# A repeated layer would overwrite a graph's outputs before their backward.
_NOT_IN_GRAPHS = (
    *("full recompute", "recompute by block", "repeated multi-token prediction"),
    *("HybridModel with multi-token prediction", "HybridModel in a virtual pipeline"),
)
# A graph repeats the random numbers, and the given choices, of its capture.
_NOT_IN_GRAPHS_OF_ROUTER = (
    *(*_NOT_IN_GRAPHS, "recompute of the MoE layer", "moe"),
    *("input jitter", "forced balance", "router replay"),
)
GRAPHS: Choice = {
    "no graphs": Setting(5),
    "graphs of attention": Setting(1, f"{_WARMED_UP} attn", never=_NOT_IN_GRAPHS),
    "graphs of router and counts": Setting(
        1, f"{_WARMED_UP} moe_router moe_preprocess", never=_NOT_IN_GRAPHS_OF_ROUTER
    ),
    "graphs up to the counts": Setting(
        1.5, f"{_WARMED_UP} attn moe_router moe_preprocess", never=_NOT_IN_GRAPHS_OF_ROUTER
    ),
}
GRAPHED = {*GRAPHS} - {"no graphs"}
NODES: Choice = {f"nodes of {size}": Setting(1, f" --fsep-node-size {size}") for size in (1, 2, 4)}
UNEVEN, EXPERT_DATA = "N does not divide E", "expert data parallel"
# They follow from sizes.
MARKS: Choice = {UNEVEN: Setting(0), EXPERT_DATA: Setting(0)}
EXPERT_SHARDING: Choice = {
    "experts by rows": Setting(1, " --fsep-sharding rows"),
    "experts at home": Setting(2, AT_HOME, never=(UNEVEN, "planner laer")),
}
# A file of homes is written for each case.
HOMES: Choice = {"permuted homes": Setting(0.35, never=_ADAPTED)}
TOLERANCES: Choice = {
    "default tolerance": Setting(0.3),
    **{
        f"tolerance {value}": Setting(0.25, f" --fsep-set imbalance_tolerance={value}")
        for value in (0, 0.05, 0.3)
    },
}
DISPATCHERS: Choice = {
    "All-to-All": Setting(0.88),
    "DeepEP": Setting(0.06, rows.DEEPEP, never=("tokens by nodes",)),
    "HybridEP": Setting(0.06, rows.HYBRIDEP, never=("tokens by nodes",)),
}
_WHOLE_LAYERS = ("full recompute", "recompute by block", "recompute of the MoE layer", "moe")
_FSDP = tuple(name for name in SHARDING if name.startswith("Megatron-FSDP"))
_NOT_SCHEDULED = (*_FROZEN, *_FSDP, *_WHOLE_LAYERS, *HYBRIDS)
# Drawn last. The reference has the plain schedule: that of parts of layers needs bf16, and experts
# on several ranks.
SCHEDULE: Choice = {
    "fused weight gradients": Setting(0.3, "", rows.UNFUSED, never=(*_FROZEN, *_FSDP)),
    "combined 1F1B": Setting(
        0.9,
        rows.COMBINED,
        needs=("bf16",),
        never=(
            *(*_NOT_SCHEDULED, "overlapped shared experts", "repeated multi-token prediction"),
            *("router replay", "graphs of attention", "graphs up to the counts"),
        ),
    ),
    "delayed weight gradients": Setting(0.7, rows.DELAYED, needs=("combined 1F1B",)),
    # With overlapped reduces, gradients of home experts would be reduced before they are computed.
    "weight gradients behind the dispatch": Setting(
        0.2,
        rows.BEHIND_DISPATCH,
        never=(
            *(*_NOT_SCHEDULED, "combined 1F1B"),
            *("overlapped reduce", "distributed optimizer, both overlaps"),
        ),
    ),
}
# All settings, by the feature that they are.
SETTINGS: Choice = {}
for _table in [value for value in vars().values() if isinstance(value, dict)]:
    if all(isinstance(item, Setting) for item in _table.values()):
        SETTINGS |= _table


def of_reference(flags: str) -> str | None:
    """Return flags with DDP and the plain schedule, or None where they are those.

    Megatron-FSDP's gradients of stock's experts may be wrong: see its rows in `rows.py`.
    """
    others = re.sub(rf"{rows.FSDP}\w+", " --use-distributed-optimizer", flags)
    others = in_plain_schedule(others)
    return None if others == flags else others


def in_plain_schedule(flags: str) -> str:
    for setting in SCHEDULE.values():
        flags = flags.replace(setting.flags, "")
    return flags
