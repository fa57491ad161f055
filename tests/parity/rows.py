"""The parity table: the combinations in which FSEP is compared with stock Megatron.

A `Row` is one combination: `tests/distributed/test_parity.py` runs it and docs/support.md lists it,
in this order. A row has a setting or a pair of features that no other row has, is a whole recipe,
or trains longer. CI runs those that `tests/parity/daily.py` chooses; the others run at night.

Over 400 lines: one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.parity.adapted import frozen_in_part, lora_on_attention
from tests.parity.bridge_lora import (
    lora_of_each_kind,
    lora_on_experts_under_recompute,
)
from tests.parity.row import (
    BF16_BOUND,
    FP8_BOUND,
    FP32_BOUND,
    HOMES,
    LION_BOUND,
    LONG,
    LONGEST,
    Row,
)

RANDOM = " --fsep-planner random"
STEP = " --fsep-restore step"
NODES = " --fsep-node-size {} --fsep-set restore_algorithm=node"
PERMUTED = HOMES + f" --fsep-homes {Path(__file__).parent}/homes_" + "{}.json"
TOKENS = " --fsep-node-size {} --fsep-token-exchange node"

DIST_OPT = " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
OFFLOADED = DIST_OPT + " --bf16 --optimizer-cpu-offload --use-precision-aware-optimizer"
FULL_RECOMPUTE = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# The first layer of a stage only.
BLOCK_RECOMPUTE = " --recompute-granularity full --recompute-method block --recompute-num-layers 1"
MOE_RECOMPUTE = " --recompute-granularity selective --recompute-modules moe"
PIPELINE = " --pipeline-model-parallel-size 2"
VIRTUAL = PIPELINE + " --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
TENSOR = " --tensor-model-parallel-size 2 --sequence-parallel"
CONTEXT = " --context-parallel-size 2"
AUX_LOSSES = (
    " --moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss"
    " --moe-aux-loss-coeff 1e-2 2e-2 3e-2 --moe-z-loss-coeff 1e-3"
)
# The reference has stock's All-to-All dispatcher; buffers of the other side are replacements.
DEEPEP = " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep"
HYBRIDEP = " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep"
# The routers' choices are given on both sides: see `tests/parity/replay.py`.
REPLAY = " --moe-enable-routing-replay"
ANNOUNCED = " --fsep-plan-mode announced"
# Megatron's default multiplies in bf16, whose rounding would hide other differences.
MUON = " --optimizer muon --muon-fp32-matmul-prec high"
MUON_BF16 = " --optimizer muon --muon-extra-scale-factor 0.5 --bf16"
# Equals `--optimizer muon --use-distributed-optimizer`, by its old name.
MUON_SHARED = MUON_BF16.replace("muon", "dist_muon", 1)
UNTIED = "--untie-embeddings-and-output-weights"
CLAMPED_GEGLU = " --quick-geglu --activation-func-clamp-value 0.1 --glu-linear-offset 1.0"
HYBRID = " --spec tests.specs.hybrid hybrid_stack_spec --hybrid-layer-pattern "
HYBRID_MTP = HYBRID + "*E-E/*E/*E --mtp-use-repeated-layer"
DELAYED = " --delay-wgrad-compute"
BEHIND_DISPATCH = " --overlap-dispatch-backward-with-experts-wgrad"
COMBINED = " --overlap-moe-expert-parallel-comm"
REPEATED = " --mtp-use-repeated-layer --mtp-num-layers "
PER_TOKEN = " --calculate-per-token-loss"
LATENT_ATTENTION = (
    " --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 12"
    " --qk-pos-emb-head-dim 4 --v-head-dim 8 --qk-layernorm"
)
LATENT_RECOMPUTE = " --recompute-granularity selective --recompute-modules mla_up_proj"
GROUPED_QUERIES = " --group-query-attention --num-query-groups 2"
AUX_LOSS = " --moe-router-load-balancing-type aux_loss"
FIRST_LAYER_DENSE = " --num-layers 3 --moe-layer-freq ([0]*1+[1]*2) --moe-ffn-hidden-size 40"
# As in DeepSeek-V3; Kimi-K2 has the same without groups.
SIGMOID_ROUTER = (
    " --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    " --moe-router-bias-update-rate 1e-3 --moe-router-dtype fp32"
    " --moe-router-load-balancing-type seq_aux_loss"
)
NO_BIAS = "--disable-bias-linear"
NO_BIAS_NOR_SWIGLU = NO_BIAS + " --swiglu"

BF16 = " --bf16"
# Products are replaced on both sides. Experts are at home: rows are refused.
FP8 = " --fp8-format hybrid --fp8-recipe tensorwise"
E4M3 = " --fp8-format e4m3 --fp8-recipe tensorwise"
BLOCKS = " --fp8-format e4m3 --fp8-recipe blockwise"
FIRST_IN_BF16 = (
    " --first-last-layers-bf16 --num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 0"
)
PADDING = " --moe-router-padding-for-quantization"
# Sizes are multiples of 32.
MXFP8 = " --fp8-format e4m3 --fp8-recipe mxfp8 --hidden-size 64"
# As in published recipes; needs `DIST_OPT`.
MXFP8_KEPT = MXFP8 + " --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag"
IN_FP8 = " --fsep-sharding experts --fsep-allow-unproven fp8-experts"
# Dense layers alone are sharded with FSEP, and all layers with stock.
FSDP = " --use-megatron-fsdp --ckpt-format fsdp_dtensor --use-distributed-optimizer"
FSDP += " --data-parallel-sharding-strategy "
TOP_1 = " --moe-router-topk 1 --moe-router-pre-softmax"
TOP_4 = " --moe-router-topk 4"
FP32_ROUTER = " --moe-router-dtype fp32"
GROUPS = (
    " --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    " --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5"
    " --moe-router-dtype fp64"
)
LATENT_MOE = " --moe-latent-size 24"
SHARED = " --moe-shared-expert-intermediate-size 32"
GATED = SHARED + " --moe-shared-expert-gate"
OVERLAPPED = " --moe-shared-expert-overlap"
SQUARED_RELU = " --squared-relu"
MTP = " --mtp-num-layers 1"
FEW_TOKENS = " --seq-length 2 --max-position-embeddings 2 --micro-batch-size 2"
SELECTIVE = " --recompute-granularity selective --recompute-modules"
# Stock's own needs Transformer Engine.
ACT_RECOMPUTE = " --moe-grouped-gemm" + SELECTIVE + " moe_act"
# Stock's own need Transformer Engine, so the stock runs have none.
GRAPHED = " --cuda-graph-impl transformer_engine --cuda-graph-modules"
GRAPHS = " --fsep-allow-unproven te-graphs" + GRAPHED
EXACT = " --fsep-plan-mode exact"
PRESET = " --fsep-preset laer --fsep-late-plan wait --fsep-node-size 2"
SCHEDULER_OFF = " --fsep-set scheduler=off"
HALF_DENSE = " --num-layers 4 --moe-layer-freq ([0]*2+[1]*2)"
FAST = " --lr 1e-2 --min-lr 1e-2"


@dataclass(frozen=True)
class Common:
    """Flags and sizes that several rows share, so that one stock run serves all of them."""

    name: str
    flags: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


# fmt: off
DEPTH_3 = Common("repeated MTP layer, depth 3, aux losses, recompute of the MoE layer, shared"
    " experts, per-token loss, distributed optimizer",
    DIST_OPT + AUX_LOSSES + MOE_RECOMPUTE + SHARED + PER_TOKEN + REPEATED + "3",
    {"moe_layers": 3, "exchanges": (6, 5)})
RECOMPUTED = Common("router replay, full recompute, shared experts, square-root softplus router,"
    " per-token loss, distributed optimizer, accumulation 2, E = 8 on 4 ranks",
    DIST_OPT + REPLAY + FULL_RECOMPUTE + SHARED + PER_TOKEN
    + " --moe-router-score-function sqrtsoftplus",
    {"ranks": 4, "accumulation": 2})
# As published recipes train it.
GLM = Common("as GLM-4.5: first layer dense, overlapped shared experts, sigmoid router in fp32 with"
    " expert bias, biased and normalised queries, multi-token prediction, recompute of attention,"
    " bf16", BF16 + DIST_OPT + GROUPED_QUERIES + FIRST_LAYER_DENSE + SIGMOID_ROUTER
    + " --moe-aux-loss-coeff 1e-3" + SHARED + OVERLAPPED + " --add-qkv-bias --qk-layernorm"
    " --rotary-percent 0.5" + MTP + " --mtp-loss-scaling-factor 0.3 --recompute-granularity"
    " selective", {"moe_layers": 3})
LAYER_RECOMPUTED = Common("recompute of the MoE layer and its overlapped shared experts with a"
    " gate, multi-token prediction, aux losses, E = 8 on 4 ranks",
    AUX_LOSSES + MOE_RECOMPUTE + MTP + GATED + OVERLAPPED, {"ranks": 4, "moe_layers": 3})
ROUTED_TO_4 = Common("top-4, sigmoid router in fp32 with expert bias, E = 8 on 4 ranks",
    TOP_4 + SIGMOID_ROUTER, {"ranks": 4})
GROUPED = Common("first layer dense, group-limited sigmoid router in fp64 with expert bias, scaling"
    " and sequence aux loss, shared experts with a gate, recompute of attention, norms, dense and"
    " shared experts, experts' weight gradients during the dispatch's backward",
    FIRST_LAYER_DENSE + BEHIND_DISPATCH + GATED + GROUPS
    + " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4"
    + SELECTIVE + " core_attn layernorm mlp shared_experts")
HYBRID_MODEL = Common("HybridModel of attention, dense and MoE layers, latent MoE without a gate,"
    " aux losses, shared experts, distributed optimizer",
    AUX_LOSSES + DIST_OPT + HYBRID + "*E-*E" + SQUARED_RELU + LATENT_MOE + SHARED,
    {"without": "--swiglu"})
IN_BF16 = Common("bf16, fp32 router, shared experts, distributed optimizer, accumulation 4",
    BF16 + DIST_OPT + SHARED + FP32_ROUTER, {"accumulation": 4, "stock": (1, 2)})
IN_BF16_ON_4 = Common("bf16, first half of the layers dense, accumulation 4, E = 8 on 4 ranks",
    BF16 + HALF_DENSE, {"ranks": 4, "accumulation": 4, "stock": (1, 4)})
TENSOR_PARALLEL = Common("tensor parallel 2, MoE in every second layer, aux losses, overlapped"
    " shared experts, fused router and permutation, per-token loss",
    TENSOR + AUX_LOSSES + " --num-layers 4 --moe-layer-freq 2" + SHARED + OVERLAPPED
    + " --moe-router-fusion --moe-permute-fusion" + PER_TOKEN, {"ranks": 4, "stock": (4, 2)})
IN_PIPELINE = Common("pipeline 2, recompute of the MoE layer, linear bias, accumulation 2",
    PIPELINE + MOE_RECOMPUTE, {"ranks": 4, "group": 2, "stock": (2, 2), "reference_ranks": 2,
    "reference_flags": MOE_RECOMPUTE, "accumulation": 2, "without": NO_BIAS, "moe_layers": 1})
# Megatron-Bridge's recipes for Blackwell in small sizes, without graphs, fused operations and
# forced balance. In a pipeline, overlapped reduces would leave parts of the compared gradients.
# HybridEP rounds a rank's sums of experts to bf16, which flips near-ties: with top-4 gradients
# are up to 1.8e-1 apart. So rows have top-2, or top-4 with these sums in fp32.
IN_MXFP8 = {"accumulation": 4, "bound": FP8_BOUND, "not_at_home": "at home in itself"}
DEEPSEEK_V3 = Common("as the recipe of DeepSeek-V3: top-4, latent attention, first layer dense,"
    " shared experts, group-limited sigmoid router with expert bias, multi-token prediction,"
    " virtual pipeline 2 x 2, recompute of up-projections, experts in mxfp8, distributed optimizer,"
    " bf16, accumulation 4", BF16 + MXFP8 + VIRTUAL + " --use-distributed-optimizer" + TOP_4
    + LATENT_ATTENTION + " --moe-layer-freq ([0]*1+[1]*3) --moe-ffn-hidden-size 32" + SIGMOID_ROUTER
    + " --moe-aux-loss-coeff 1e-4 --moe-router-num-groups 4 --moe-router-group-topk 2"
    " --moe-router-topk-scaling-factor 2.5" + SHARED + MTP + LATENT_RECOMPUTE, IN_MXFP8
    | {"ranks": 4, "stock": (1, 2)})
QWEN3 = Common("as the recipe of Qwen3: grouped and normalised queries, aux loss, fp32 router,"
    " fused router and permutation, experts kept in mxfp8, both overlaps, bf16,"
    " accumulation 4", BF16 + MXFP8_KEPT + DIST_OPT + GROUPED_QUERIES + AUX_LOSS
    + " --qk-layernorm --kv-channels 16 --moe-aux-loss-coeff 1e-3" + FP32_ROUTER
    + " --moe-router-fusion --moe-permute-fusion", IN_MXFP8 | {"stock": (1, 2)})
GPT_OSS = Common("as the recipe of gpt-oss: linear bias, clamped and offset quick-GEGLU, learned"
    " softmax, windows, aux loss, fp32 router, experts kept in mxfp8, both overlaps, bf16,"
    " accumulation 4", BF16 + MXFP8_KEPT + DIST_OPT + CLAMPED_GEGLU + GROUPED_QUERIES + AUX_LOSS
    + " --moe-aux-loss-coeff 1e-3 --softmax-type learnable --window-size 15,0"
    " --window-attn-skip-freq 2" + FP32_ROUTER, IN_MXFP8 | {"ranks": 4, "stock": (4, 2),
    "without": NO_BIAS_NOR_SWIGLU})
LORA_OF_EACH_KIND = Common("LoRA on attention, and on the first, the second, or canonically on both"
    " matrices of a layer's experts, shared experts, accumulation 2, E = 8 on 4 ranks",
    SHARED + " --num-layers 3" + FAST, {"ranks": 4, "accumulation": 2, "moe_layers": 3,
    "adapt": lora_of_each_kind, "not_at_home": "the same"})
LORA_ON_EXPERTS = Common("LoRA on experts with linear bias, router replay, full recompute, tensor"
    " parallel 2, expert data parallel 2, bf16, distributed optimizer, accumulation 2",
    BF16 + " --use-distributed-optimizer" + REPLAY + FULL_RECOMPUTE + TENSOR + FAST,
    {"ranks": 4, "group": 2, "accumulation": 2, "without": NO_BIAS,
    "adapt": lora_on_experts_under_recompute, "not_at_home": "the same"})
# fmt: on


def _row(id: str, name: str, flags: str = "", fsep: str = "", **more: Any) -> Row:
    """Return a row with common defaults: random layouts, and a bound by precision."""
    ranks, group = more.get("ranks", 2), more.pop("group", None)
    return Row(
        id,
        name,
        flags,
        fsep if "--fsep-plan" in fsep or PRESET in fsep else RANDOM + fsep,
        stock_parallel=more.pop("stock", (group or ranks, 1)),
        bound=more.pop("bound", BF16_BOUND if BF16 in flags else FP32_BOUND),
        expert_parallel=group,
        **more,
    )


def _fsdp(id: str, strategy: str, name: str, flags: str = "", fsep: str = "", **more: Any) -> Row:
    """Return a row with dense layers sharded by Megatron-FSDP, and experts at home."""
    return _row(id, f"Megatron-FSDP, {strategy}{name}",
        FSDP + strategy + flags.replace(" --use-distributed-optimizer", ""),
        f" --fsep-sharding experts{fsep}", not_at_home="at home in itself", **more)  # fmt: skip


def _combined(id: str, name: str, flags: str, fsep: str = "", **more: Any) -> Row:
    """Return a row with Megatron's combined 1F1B schedule, which needs bf16 and several ranks.

    So the reference is stock with its plain schedule, and the other stock run has the combined one.
    """
    reference = BF16 + flags.replace(DELAYED, "")
    return _row(id, f"{name}, bf16, accumulation 4", BF16 + flags + COMBINED, fsep, accumulation=4,
        stock=(1, more.get("group", 2)), reference_flags=reference, **more)  # fmt: skip


def _muon(id: str, name: str, flags: str, **more: Any) -> Row:
    """Return a row with Muon, which needs experts at home."""
    return _row(id, name, flags, fsep=HOMES, not_at_home="at home in itself", **more)


def _on(common: Common, id: str, name: str = "", fsep: str = "", **more: Any) -> Row:
    """Return a row with these flags of both sides, and its own of FSEP's."""
    name = f"{name}, {common.name}" if name else common.name
    return _row(id, name, common.flags, fsep, **common.sizes | more)


def _recipe(common: Common, id: str, **more: Any) -> Row:
    """Return a row with a recipe's schedule and dispatcher, which the reference lacks."""
    name = "combined 1F1B, delayed weight gradients, flex dispatcher with HybridEP"
    name += " and sums in fp32" if more.get("exact") else ""
    fsep = IN_FP8 + HYBRIDEP
    row = _on(common, f"recipe-{id}", name, fsep, reference_flags=common.flags, **more)
    return replace(row, flags=row.flags + DELAYED + COMBINED)


# A row: its id, its name, flags of both sides, and differences from the defaults of `Row`.
# fmt: off
ROWS = [
    _row("plain", "plain DDP", steps=LONG),
    _row("dist-opt", "distributed optimizer with both overlaps", DIST_OPT, steps=LONG),
    _row("accum", "accumulation 4", accumulation=4, steps=LONG),
    _row("accum-dist-opt", "accumulation 4, distributed optimizer", DIST_OPT, accumulation=4,
        steps=LONG),
    _row("shared", "shared experts", SHARED, steps=LONG),
    _row("aux", "aux loss", " --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2",
        steps=LONG),
    _row("bias-router", "expert bias", " --moe-router-enable-expert-bias"
        " --moe-router-score-function sigmoid --moe-router-bias-update-rate 1e-2", steps=LONG),
    _row("full-recompute", "full recompute", FULL_RECOMPUTE, steps=LONG),
    _row("moe-recompute", "selective recompute of the MoE layer", MOE_RECOMPUTE, steps=LONG),
    _row("bf16", "bf16", BF16, steps=LONG),
    _row("bf16-grads", "main gradients in bf16, accumulation 2", BF16 + " --grad-reduce-in-bf16",
        accumulation=2),
    _row("few-tokens", "few tokens: experts, ranks and microbatches without any", FEW_TOKENS,
        ranks=4),
    _row("top1", "top-1", TOP_1),
    _row("even-split", "even split, most slots, router padding, without effect", capacity=8,
        # Without fp8 Megatron itself refuses the padding.
        fsep=" --fsep-set split=even" + PADDING),
    _row("greedy", "planner greedy, adaptive, tolerance 0.02", fsep=" --fsep-planner greedy"
        " --fsep-plan-mode adaptive --fsep-set imbalance_tolerance=0.02"),
    _row("forecast", "planner greedy, forecast", fsep=" --fsep-planner greedy --fsep-plan-mode"
        " forecast"),
    _on(ROUTED_TO_4, "preset", "preset laer on nodes of 2", fsep=PRESET, capacity=4),
    _row("preset-virtual", "preset laer, virtual pipeline 2 x 2, accumulation 4", VIRTUAL, PRESET,
        ranks=4, group=2, accumulation=4, capacity=5),
    _row("exact", "fresh layouts after the gate, exact", fsep=EXACT, releases=True),
    _on(ROUTED_TO_4, "exact-nodes", "exact on nodes of 2", fsep=EXACT + NODES.format(2)),
    _on(LAYER_RECOMPUTED, "nodes", "exchange through nodes of 2", fsep=NODES.format(2)),
    _on(RECOMPUTED, "nodes-dist-opt", "exchange through nodes of 2", fsep=NODES.format(2)),
    _row("nodes-virtual", "exchange through nodes of 1, virtual pipeline 2 x 2, accumulation 4",
        VIRTUAL, fsep=NODES.format(1), ranks=4, group=2, accumulation=4),
    _on(IN_BF16_ON_4, "nodes-step", "restored once per step through nodes of 2",
        fsep=NODES.format(2) + STEP),
    _on(RECOMPUTED, "announced", "announced by router replay", fsep=ANNOUNCED),
    _row("announced-pipeline", "announced by router replay, full recompute, pipeline 2,"
        " accumulation 4", REPLAY + PIPELINE + FULL_RECOMPUTE, fsep=ANNOUNCED, ranks=4, group=2,
        accumulation=4, moe_layers=1),
    # Homes by a permutation.
    _on(DEPTH_3, "homes", "permuted homes, flex dispatcher with DeepEP", fsep=PERMUTED.format(2)
        + DEEPEP, not_at_home="at home in itself"),
    _on(ROUTED_TO_4, "homes-nodes", "permuted homes, tokens through nodes of 2",
        fsep=PERMUTED.format(4) + TOKENS.format(2), not_at_home="at home in itself"),
    _on(RECOMPUTED, "homes-announced", "permuted homes, announced by router replay",
        fsep=PERMUTED.format(4) + ANNOUNCED, not_at_home="at home in itself"),
    _row("scheduler-off", "scheduler off, experts' products by grouped_mm", fsep=SCHEDULER_OFF
        + " --fsep-set gemm=torch"),
    # Experts in fp8.
    _row("fp8", "experts in fp8, per-tensor current scaling", FP8, fsep=IN_FP8, bound=FP8_BOUND,
        steps=LONG, not_at_home="at home in itself"),
    _row("fp8-dist-opt", "experts in fp8, per-tensor current scaling, bf16, distributed"
        " optimizer, shared experts, accumulation 2", FP8 + BF16 + DIST_OPT + SHARED,
        fsep=IN_FP8, bound=FP8_BOUND, accumulation=2, not_at_home="at home in itself"),
    _row("fp8-nodes", "exchange through nodes of 2, restored once per step, experts in fp8 (e4m3),"
        " per-tensor current scaling, distributed optimizer, linear bias, router padding, recompute"
        " of the MoE layer, accumulation 2, E = 8 on 4 ranks", E4M3 + DIST_OPT + PADDING
        + MOE_RECOMPUTE, fsep=IN_FP8 + NODES.format(2) + STEP, ranks=4, stock=(4, 2),
        accumulation=2, without=NO_BIAS, bound=FP8_BOUND, not_at_home="at home in itself"),
    _row("fp8-param", "experts kept in fp8 by blocks, the first layer's in bf16, full recompute",
        BLOCKS + BF16 + DIST_OPT + FULL_RECOMPUTE + FIRST_IN_BF16 + " --fp8-param-gather",
        fsep=IN_FP8, bound=FP8_BOUND, accumulation=2, not_at_home="at home in itself"),
    _row("fp8-flex", "flex dispatcher with HybridEP, experts in fp8 by blocks, bf16, router"
        " padding, accumulation 4", BF16 + BLOCKS + PADDING, fsep=IN_FP8 + HYBRIDEP, accumulation=4,
        stock=(1, 2), bound=FP8_BOUND, not_at_home="at home in itself"),
    _row("fp8-mx", "experts in mxfp8", MXFP8, fsep=IN_FP8, bound=FP8_BOUND, steps=LONG,
        not_at_home="at home in itself"),
    _row("fp8-mx-recompute", "experts in mxfp8 (hybrid), full recompute, bf16, distributed"
        " optimizer, accumulation 2, shared experts", MXFP8.replace("e4m3", "hybrid") + BF16
        + FULL_RECOMPUTE + DIST_OPT + SHARED, fsep=IN_FP8, bound=FP8_BOUND, accumulation=2,
        exchanges=(6, 2), not_at_home="at home in itself"),
    _on(GPT_OSS, "fp8-mx-nodes", "exchange through nodes of 2, restored once per step, recompute of"
        " the MoE layer", fsep=IN_FP8 + NODES.format(2) + STEP + MOE_RECOMPUTE, exchanges=(4, 2)),
    _on(QWEN3, "fp8-mx-homes", "permuted homes, full recompute", fsep=IN_FP8 + FULL_RECOMPUTE
        + PERMUTED.format(2), exchanges=(6, 2)),
    # Dispatchers.
    _on(LAYER_RECOMPUTED, "deepep-shared", "flex dispatcher with DeepEP", fsep=DEEPEP,
        releases=True),
    _row("hybridep", "flex dispatcher with HybridEP", fsep=HYBRIDEP, capacity=6, releases=True),
    _on(LAYER_RECOMPUTED, "hybridep-padded", "flex dispatcher with HybridEP, padded inputs, fused"
        " permutation", fsep=HYBRIDEP + " --moe-hybridep-pad-uneven-dispatch-inputs"
        " --moe-permute-fusion-into-hybridep"),
    # Tokens by nodes: two stages with nodes of 2 on 4 ranks, otherwise one.
    _row("tokens-nodes1", "tokens through nodes of 1", fsep=TOKENS.format(1), steps=LONG),
    _on(ROUTED_TO_4, "tokens-nodes2", "tokens through nodes of 2", fsep=TOKENS.format(2),
        steps=LONG, releases=True),
    _row("tokens-one-node", "tokens through one node of 4, E = 3 on 4 ranks", " --adam-eps 1e-6",
        fsep=TOKENS.format(4), ranks=4, experts=3, stock=(1, 1), reference_ranks=1),
    _on(IN_BF16_ON_4, "tokens-exact", "tokens and experts through nodes of 2, exact",
        fsep=EXACT + " --fsep-token-exchange node" + NODES.format(2),
        not_at_home="bf16 sums of nodes flip a near-tie: 4.9e-2, 5.6e-3 given stock's"
        " choices"),
    _row("tokens-few", "tokens through nodes of 2, few tokens: experts, ranks and microbatches"
        " without any", FEW_TOKENS, fsep=TOKENS.format(2), ranks=4),
    _on(RECOMPUTED, "tokens-shared", "tokens through nodes of 2", fsep=TOKENS.format(2)),
    _on(LAYER_RECOMPUTED, "tokens-mtp", "tokens through nodes of 2", fsep=TOKENS.format(2)),
    _row("tokens-tensor", "tokens through nodes of 2, tensor parallel 2 with sequence parallel,"
        " fp32 router, bf16", TENSOR + BF16 + FP32_ROUTER, fsep=TOKENS.format(2), ranks=4,
        stock=(4, 2)),
    _on(HYBRID_MODEL, "tokens-latent", "tokens through nodes of 1", fsep=TOKENS.format(1)),
    # With one expert-parallel rank, Megatron's local layers cannot train an expert's bias.
    _row("tokens-bias", "tokens through nodes of 1, scheduler off, evaluation and hashes of weights"
        " between steps, linear bias without a gate, probabilities applied on input, top-1,"
        " per-token loss, expert data parallel 2", SQUARED_RELU + " --moe-apply-probs-on-input"
        + TOP_1 + PER_TOKEN + " --eval-interval 4 --eval-iters 2"
        " --check-weight-hash-across-dp-replicas-interval 2", fsep=TOKENS.format(1) + SCHEDULER_OFF,
        ranks=4, group=2, stock=(2, 4), without=NO_BIAS_NOR_SWIGLU, evaluations=4),
    _row("tokens-virtual", "tokens through nodes of 1, virtual pipeline 2 x 2, accumulation 4,"
        " restored once per step", VIRTUAL, fsep=TOKENS.format(1) + STEP, ranks=4, group=2,
        accumulation=4),
    _on(GROUPED, "tokens-router", "tokens through nodes of 1, recompute of the experts' activation",
        fsep=TOKENS.format(1) + ACT_RECOMPUTE),
    _on(IN_BF16, "step-bf16", "restored once per step, experts' products by grouped_mm",
        fsep=STEP + " --fsep-set gemm=torch"),
    _row("e8-on-4", "E = 8 on 4 ranks", ranks=4, steps=LONG),
    _row("e6-on-4", "E = 6 on 4 ranks", ranks=4, experts=6, stock=(1, 2), reference_ranks=1,
        steps=LONG),
    # With Adam's default of 1e-8 one gradient in 6144 is so near to zero that rounding moves its
    # weight by 4e-6. Neither stock run happens to show that.
    _row("e3-on-4", "E = 3 on 4 ranks", " --adam-eps 1e-6", ranks=4, experts=3, stock=(1, 1),
        reference_ranks=1, steps=LONG),
    _row("edp", "expert data parallel 2", ranks=4, group=2, steps=LONG),
    _on(TENSOR_PARALLEL, "tensor", releases=True),
    _row("tensor-edp", "tensor parallel 2, expert data parallel 2, distributed optimizer", TENSOR
        + DIST_OPT, ranks=4, group=2, stock=(2, 4)),
    _row("pipeline", "pipeline 2", PIPELINE, ranks=4, group=2, steps=LONG, moe_layers=1),
    _row("virtual", "virtual pipeline 2 x 2, accumulation 4", VIRTUAL, ranks=4, group=2,
        accumulation=4, releases=True),
    _row("step-pipeline", "restored once per step through nodes of 1, pipeline 2, accumulation 4",
        PIPELINE, fsep=NODES.format(1) + STEP, ranks=4, group=2, accumulation=4, moe_layers=1),
    _row("wire-fp32", "exchange through nodes of 2, fp32 on the wire, pipeline 2, bf16,"
        " first half of the layers dense, accumulation 4, E = 8 on 8 ranks", PIPELINE
        + IN_BF16_ON_4.flags, fsep=NODES.format(2) + " --fsep-set grad_wire_dtype=fp32", ranks=8,
        group=4, stock=(1, 2), reference_ranks=4, reference_flags=IN_BF16_ON_4.flags,
        accumulation=4, moe_layers=0),
    _row("recompute-pipeline", "full recompute, pipeline 2, accumulation 4", PIPELINE
        + FULL_RECOMPUTE, ranks=4, group=2, accumulation=4, steps=LONG, moe_layers=1),
    # Megatron-FSDP. Where experts have one replica and microbatches are several, its gradients of
    # stock's experts are wrong but for `optim`, so the reference has DDP.
    _fsdp("fsdp-moe", "optim_grads", f", both overlaps, recompute of the MoE layer, {IN_BF16.name}",
        IN_BF16.flags, reference_flags=IN_BF16.flags, fsep=MOE_RECOMPUTE,
        **IN_BF16.sizes | {"stock": (1, 1)}),
    _fsdp("fsdp-exact", "optim_grads_params", ", both overlaps, exact, tokens and experts through"
        f" nodes of 2, scheduler off, {RECOMPUTED.name}", RECOMPUTED.flags, fsep=EXACT
        + TOKENS.format(2) + SCHEDULER_OFF + " --fsep-set restore_algorithm=node",
        reference_flags=RECOMPUTED.flags, **RECOMPUTED.sizes),
    _fsdp("fsdp-step", "optim", ", restored once per step, full recompute, shared experts,"
        " per-token loss, expert data parallel 2, accumulation 2", FULL_RECOMPUTE + SHARED
        + PER_TOKEN, fsep=STEP, ranks=4, group=2, accumulation=2, stock=(1, 2)),
    _fsdp("fsdp-tensor", "optim_grads_params", f", expert data parallel 2, {TENSOR_PARALLEL.name}",
        TENSOR_PARALLEL.flags, reference_flags=TENSOR_PARALLEL.flags, group=2,
        **TENSOR_PARALLEL.sizes),
    _fsdp("fsdp-context", "optim_grads_params", ", context parallel 2, expert data parallel 2",
        CONTEXT, ranks=4, group=2, stock=(1, 2)),
    # Losses and routers.
    _row("losses", "aux, sequence, global and z losses, full recompute of one layer in two,"
        " multi-token prediction, overlapped shared experts with a gate, fp32 router, accumulation"
        " 2", AUX_LOSSES + BLOCK_RECOMPUTE + MTP + GATED + OVERLAPPED + FP32_ROUTER,
        accumulation=2, moe_layers=3),
    # Models.
    _on(GROUPED, "dense-first"),
    _on(DEPTH_3, "mtp3-exact", "exact", fsep=EXACT,
        not_at_home="passes of a repeated layer with other replicas restore them anew"),
    _row("mtp2-step", "restored once per step, forecast, half of the optimizer offloaded to the CPU"
        " with both copies overlapped, main gradients in bf16, tied embeddings, repeated MTP layer,"
        " depth 2, full recompute, accumulation 2", OFFLOADED + " --optimizer-offload-fraction 0.5"
        " --overlap-cpu-optimizer-d2h-h2d --grad-reduce-in-bf16" + FULL_RECOMPUTE + REPEATED + "2",
        fsep=" --fsep-planner greedy --fsep-plan-mode forecast" + STEP, accumulation=2,
        without=UNTIED, moe_layers=3),
    _row("mtp2-pipeline", "repeated MTP layer, depth 2, adaptive, full recompute, pipeline 2,"
        " accumulation 2", PIPELINE + FULL_RECOMPUTE + REPEATED + "2", fsep=" --fsep-planner"
        " greedy --fsep-set imbalance_tolerance=0.02",
        ranks=4, group=2, accumulation=2, moe_layers=1),
    _row("latent-attention", "latent attention, recompute of its up-projections, quantile balancing"
        " with a moving average, Lion, accumulation 2", LATENT_ATTENTION + " --rope-type rope"
        + LATENT_RECOMPUTE + " --moe-router-load-balancing-type quantile_balancing"
        " --moe-router-quantile-balancing-ema 0.5 --optimizer lion", fsep=RANDOM + HOMES,
        accumulation=2, bound=LION_BOUND, not_at_home="at home in itself"),
    _row("delta-net", "gated delta net before attention, recompute of its output norm, shared"
        " experts, global aux loss",
        " --spec tests.specs.gated_delta_net block_spec --experimental-attention-variant"
        " gated_delta_net --linear-attention-freq 2 --linear-key-head-dim 8"
        " --linear-value-head-dim 12 --linear-num-key-heads 2 --linear-num-value-heads 4"
        " --moe-router-load-balancing-type global_aux_loss"
        " --moe-aux-loss-coeff 1e-3" + SHARED + SELECTIVE + " gdn_norm_out"),
    # A smaller version of Megatron's own command for 256 GPUs.
    _row("deepseek-v3", "as DeepSeek-V3: latent attention, first layer dense, shared experts,"
        " group-limited sigmoid router with expert bias, multi-token prediction, flex dispatcher"
        " with DeepEP, recompute", DIST_OPT + LATENT_ATTENTION + FIRST_LAYER_DENSE + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-4 --moe-router-num-groups 4 --moe-router-group-topk 2"
        " --moe-router-topk-scaling-factor 2.5" + SHARED + " --rotary-scaling-factor 40 --mscale"
        " 1.0 --mscale-all-dim 1.0" + MTP + " --mtp-loss-scaling-factor 0.1" + LATENT_RECOMPUTE
        + " mlp moe layernorm", fsep=DEEPEP, moe_layers=3),
    # As with Kimi-K2's 384, the number of experts is no power of two. Stock's own recompute of
    # their activation needs Transformer Engine.
    _row("kimi-k2", "as Kimi-K2: latent attention, first layer dense, shared experts, sigmoid"
        " router with expert bias, flex dispatcher with HybridEP, recompute with the experts'"
        " activation", DIST_OPT + LATENT_ATTENTION + FIRST_LAYER_DENSE + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-3 --moe-router-num-groups 1 --moe-router-group-topk 1"
        " --moe-router-topk-scaling-factor 2.827" + SHARED + " --rotary-scaling-factor 32 --mscale"
        " 1.0 --mscale-all-dim 1.0" + LATENT_RECOMPUTE + " mlp layernorm", fsep=HYBRIDEP
        + " --moe-grouped-gemm" + LATENT_RECOMPUTE + " mlp layernorm moe_act", experts=6),
    # Feature sets of published commands, in smaller sizes, like the two before. In a pipeline,
    # overlapped reduces would leave parts of the compared gradients.
    _row("mixtral", "as Mixtral: grouped queries, aux loss, pipeline 2, distributed optimizer,"
        " accumulation 2", PIPELINE + " --use-distributed-optimizer" + GROUPED_QUERIES + AUX_LOSS
        + " --moe-aux-loss-coeff 1e-2", ranks=4, group=2, accumulation=2, moe_layers=1),
    # Stock recomputes nothing here, since that needs Transformer Engine.
    _row("qwen3", "as Qwen3: grouped and normalised queries, top-4, aux loss, fp32 router, fused"
        " router and permutation, tensor parallel 2, flex dispatcher with DeepEP, recompute of"
        " norms and of the experts' activation", TENSOR + DIST_OPT + GROUPED_QUERIES + AUX_LOSS
        + " --qk-layernorm --kv-channels 16 --moe-aux-loss-coeff 1e-3" + TOP_4 + FP32_ROUTER
        + " --moe-ffn-hidden-size 40 --moe-router-fusion --moe-permute-fusion", fsep=DEEPEP
        + ACT_RECOMPUTE + " layernorm", ranks=4, stock=(4, 2)),
    _on(GLM, "glm"),
    _row("gpt-oss", "as gpt-oss: linear bias, clamped and offset quick-GEGLU, learned softmax,"
        " windows, top-4, aux loss, fp32 router, bf16, recompute of the experts' activation,"
        " through nodes of 2, four slots", BF16 + DIST_OPT + CLAMPED_GEGLU + GROUPED_QUERIES
        + AUX_LOSS + " --softmax-type learnable --window-size 15,0 --window-attn-skip-freq 2"
        " --moe-aux-loss-coeff 1e-3" + TOP_4 + FP32_ROUTER,
        fsep=NODES.format(2) + ACT_RECOMPUTE, ranks=4, stock=(4, 2), capacity=4,
        without=NO_BIAS_NOR_SWIGLU),
    # No Mamba layers, for which Megatron has only GPU kernels.
    _row("nemotron", "as Nemotron-3: HybridModel, latent MoE without a gate, shared experts,"
        " sigmoid router with expert bias, repeated multi-token prediction, flex dispatcher with"
        " HybridEP", DIST_OPT + HYBRID + "*E-*E/*E/*E --mtp-use-repeated-layer" + SQUARED_RELU
        + LATENT_MOE + SIGMOID_ROUTER + " --moe-aux-loss-coeff 1e-4"
        " --moe-router-topk-scaling-factor 5.0" + SHARED + " --calculate-per-token-loss",
        fsep=HYBRIDEP, without="--swiglu", capacity=6, moe_layers=3, exchanges=(6, 4)),
    # With one expert-parallel rank, Megatron's local layers cannot train an expert's bias.
    # With three slots at home, rounding decides a value at the clamp in step 44: losses are 4.4e-7
    # apart, weights 1.2e-3.
    _row("bias-clamp", "linear bias, clamped and offset quick-GEGLU", CLAMPED_GEGLU, ranks=4,
        stock=(4, 2), without=NO_BIAS_NOR_SWIGLU, steps=LONG, capacity=4),
    _row("bias-tensor", "linear bias, tensor parallel 2 with sequence parallel, per-token loss",
        TENSOR + PER_TOKEN, ranks=4, stock=(4, 2), without=NO_BIAS),
    _on(IN_PIPELINE, "bias-pipeline"),
    _row("bias-step", "linear bias, restored once per step, bf16, accumulation 4", CLAMPED_GEGLU
        + BF16, fsep=STEP, ranks=4, group=2, stock=(4, 2), accumulation=4,
        without=NO_BIAS_NOR_SWIGLU),
    _row("hybrid-mtp", "HybridModel, two MoE layers repeated by multi-token prediction, full"
        " recompute, sinkhorn router, SGD with momentum, exact", FULL_RECOMPUTE + HYBRID
        + "*-E/*E-E/*E-E --mtp-use-repeated-layer --moe-router-load-balancing-type sinkhorn"
        " --optimizer sgd --sgd-momentum 0.9 --lr 5e-2 --min-lr 5e-2", fsep=EXACT, moe_layers=3,
        exchanges=(10, 5)),
    _row("hybrid-virtual", "HybridModel, virtual pipeline 2 x 2, repeated multi-token prediction,"
        " full recompute, aux losses, overlapped shared experts, distributed optimizer,"
        " accumulation 2", PIPELINE + " --use-distributed-optimizer" + FULL_RECOMPUTE
        + AUX_LOSSES + SHARED + OVERLAPPED + HYBRID
        + "*E|E-|*E|-E/*E/*E --mtp-use-repeated-layer", ranks=4, group=2, accumulation=2),
    # Parallelism.
    _row("context", f"context parallel 2, {HYBRID_MODEL.name}", CONTEXT + HYBRID_MODEL.flags,
        ranks=4, stock=(2, 4), reference_ranks=2, reference_flags=HYBRID_MODEL.flags,
        **HYBRID_MODEL.sizes),
    _row("instances", "distributed optimizer in 2 instances, expert data parallel 2, forced"
        " balance, input jitter", DIST_OPT + " --num-distributed-optimizer-instances 2"
        " --moe-router-force-load-balancing --moe-input-jitter-eps 1e-1", ranks=4, group=2,
        gradients=False),
    _row("pipeline-dense", "pipeline 2 whose first stage has no MoE layer, aux losses,"
        " accumulation 2", PIPELINE + AUX_LOSSES + " --num-layers 4 --moe-layer-freq ([0]*2+[1]*2)",
        ranks=4, group=2, accumulation=2, moe_layers=0),
    _row("pipeline-mtp", "pipeline 2 with multi-token prediction and tied embeddings, accumulation"
        " 2", PIPELINE + MTP, ranks=4, group=2, accumulation=2, without=UNTIED, moe_layers=1),
    # Megatron's combined 1F1B schedule, which runs with bf16 alone.
    _combined("combined", "combined 1F1B, shared experts, fp32 router, both overlaps",
        DIST_OPT + SHARED + FP32_ROUTER),
    _combined("combined-fp8-hybridep", "combined 1F1B, experts in fp8 by blocks, router padding,"
        " flex dispatcher with HybridEP", BLOCKS + PADDING, IN_FP8 + HYBRIDEP, bound=FP8_BOUND,
        not_at_home="at home in itself"),
    _recipe(DEEPSEEK_V3, "deepseek-v3", group=2, exact=True),
    _recipe(QWEN3, "qwen3"),
    _recipe(GPT_OSS, "gpt-oss"),
    _combined("delayed-virtual", "combined 1F1B, delayed weight gradients, virtual pipeline 2 x 2,"
        " multi-token prediction, latent MoE", VIRTUAL + MTP + LATENT_MOE + DELAYED, ranks=4,
        group=2),
    _combined("delayed-exact", "combined 1F1B, delayed weight gradients, exact, DeepEP, recompute"
        " of norms, activations and shared experts, fp32 router, both overlaps",
        DIST_OPT + SHARED + FP32_ROUTER + DELAYED,
        fsep=EXACT + DEEPEP + ACT_RECOMPUTE + " layernorm shared_experts"),
    _combined("delayed-step", "combined 1F1B, delayed weight gradients, restored once per step,"
        " tokens through nodes of 2, first half of the layers dense", HALF_DENSE
        + DELAYED, fsep=TOKENS.format(2) + STEP, ranks=4, group=4),
    _combined("delayed-graphs", "combined 1F1B, delayed weight gradients, CUDA graphs of router and"
        " counts, shared experts, fp32 router, both overlaps",
        DIST_OPT + SHARED + FP32_ROUTER + DELAYED, fsep=GRAPHS + " moe_router moe_preprocess"),
    _on(GROUPED, "dispatch-wgrad-off", "scheduler off", fsep=SCHEDULER_OFF),
    # Frozen weights.
    _row("lora", "LoRA on attention, distributed optimizer", DIST_OPT + FAST, exchanges=(4, 0),
        adapt=lora_on_attention),
    _row("lora-step", "LoRA on attention, full recompute, restored once per step, accumulation 2,"
        " bf16", FULL_RECOMPUTE + BF16 + FAST, fsep=STEP, accumulation=2, exchanges=(2, 0),
        adapt=lora_on_attention),
    # LoRA on experts at home, as Megatron-Bridge adds it.
    _on(LORA_ON_EXPERTS, "lora-experts", fsep=RANDOM + HOMES),
    _on(LORA_ON_EXPERTS, "lora-announced", "announced", fsep=ANNOUNCED + HOMES),
    _on(LORA_OF_EACH_KIND, "lora-kinds", "exact", fsep=EXACT + HOMES),
    _on(LORA_OF_EACH_KIND, "lora-canonical", "tokens through nodes of 2", fsep=RANDOM
        + TOKENS.format(2) + HOMES),
    _on(LORA_OF_EACH_KIND, "lora-all", "exchange through nodes of 2, restored once per step",
        fsep=RANDOM + STEP + NODES.format(2) + HOMES),
    _row("frozen", "first layer and first matrix of experts frozen, recompute of the MoE layer,"
        " forced bias that stays, distributed optimizer, accumulation 2", MOE_RECOMPUTE + DIST_OPT
        + " --moe-router-force-biased -1", accumulation=2, exchanges=(3, 1),
        adapt=frozen_in_part),
    # Graphs, by the sets of modules that published recipes capture.
    _row("graphs", "CUDA graphs of router and counts, shared experts, distributed optimizer,"
        " recompute of norms", DIST_OPT + SHARED, fsep=SELECTIVE + " layernorm" + GRAPHS
        + " moe_router moe_preprocess", at_night=LONGEST),
    _row("graphs-attention", "CUDA graphs of attention, router and counts, flex dispatcher with"
        " HybridEP", fsep=HYBRIDEP + GRAPHS + " attn moe_router moe_preprocess", capacity=6,
        at_night=LONGEST),
    _on(GROUPED, "graphs-dense", "CUDA graphs of attention, dense layers, router and counts, flex"
        " dispatcher with DeepEP", fsep=DEEPEP + GRAPHS + " attn mlp moe_router moe_preprocess",
        at_night=LONGEST),
    _on(HYBRID_MODEL, "graphs-hybrid", "CUDA graphs of attention, router and counts",
        fsep=GRAPHS + " attn moe_router moe_preprocess", at_night=LONGEST),
    _on(IN_PIPELINE, "graphs-tokens", "CUDA graphs of attention, router and counts, tokens through"
        " nodes of 2, recompute of norms", fsep=TOKENS.format(2) + SELECTIVE + " layernorm"
        + GRAPHS + " attn moe_router moe_preprocess", at_night=LONGEST),
    _on(LAYER_RECOMPUTED, "graphs-recompute", "CUDA graphs of attention", fsep=GRAPHS + " attn",
        at_night=LONGEST),
    _row("graphs-virtual", "CUDA graphs of attention, router and counts, virtual pipeline 2 x 2,"
        " accumulation 4", VIRTUAL, fsep=GRAPHS + " attn moe_router moe_preprocess", ranks=4,
        group=2, accumulation=4, at_night=LONGEST),
    _on(GLM, "graphs-glm", "CUDA graphs of attention, dense layers, router and counts",
        fsep=GRAPHS + " attn mlp moe_router moe_preprocess"),
    _on(LORA_OF_EACH_KIND, "graphs-lora", "CUDA graphs of attention, router and counts",
        fsep=GRAPHS + " attn moe_router moe_preprocess" + HOMES),
    _row("graphs-muon", "CUDA graphs of attention, router and counts, dist_muon, expert data"
        " parallel 2, pipeline 2, bf16, accumulation 2", MUON_SHARED + PIPELINE
        + " --muon-tp-mode distributed", fsep=HOMES + GRAPHS + " attn moe_router moe_preprocess",
        ranks=4, group=2, accumulation=2, moe_layers=1, not_at_home="at home in itself"),
    # Runs.
    _muon("muon-bf16", "Muon, bf16, accumulation 2, shared experts", MUON_BF16 + SHARED,
        accumulation=2),
    _muon("muon-tensor", "Muon with Nesterov momentum, other scales and coefficients, tensor"
        " parallel 2, linear bias", MUON + TENSOR + " --muon-tp-mode duplicated --muon-nesterov"
        " --muon-momentum 0.95 --muon-scale-mode unit_rms_norm --muon-extra-scale-factor 0.2"
        " --muon-coefficient-type polar_express --muon-num-ns-steps 8 --muon-no-split-qkv",
        ranks=4, stock=(4, 2), without=NO_BIAS),
    _row("evaluate-only", "evaluation alone", " --skip-train --eval-iters 2", steps=0,
        evaluations=1, gradients=False),
]
# fmt: on

HOME_ROWS = [row.at_home for row in ROWS if row.needs_rows is None]
ALL_ROWS = [*ROWS, *HOME_ROWS]
