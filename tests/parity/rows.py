"""The parity table: the combinations in which FSEP is compared with stock Megatron.

A `Row` is one combination: `tests/distributed/test_parity.py` runs it and docs/support.md lists it,
in this order. CI runs those of `daily`, which have every pair of settings that any row has; the
others run at night.

Over 400 lines: one table.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from tests.parity.adapted import frozen_in_part, lora_on_attention, lora_under_recompute
from tests.parity.bridge_lora import (
    canonical_lora_on_experts,
    lora_on_attention_and_experts,
    lora_on_experts,
    lora_on_experts_under_recompute,
    lora_on_first_layers,
    lora_on_second_layers,
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
NODES = " --fsep-node-size {} --fsep-restore-algorithm node"
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
KEPT_IN_MXFP8 = MXFP8 + BF16 + DIST_OPT + " --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag"
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
GRAPHS = " --fsep-allow-unproven te-graphs --cuda-graph-impl transformer_engine"
GRAPHS += " --cuda-graph-modules"
EXACT = " --fsep-plan-mode exact"
SCHEDULER_OFF = " --fsep-scheduler off"


def _row(id: str, name: str, flags: str = "", fsep: str = "", **more: Any) -> Row:
    """Return a row with common defaults: random layouts, and a bound by precision."""
    ranks, group = more.get("ranks", 2), more.pop("group", None)
    return Row(
        id,
        name,
        flags,
        fsep if "--fsep-plan" in fsep else RANDOM + fsep,
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


def _lora(id: str, name: str, adapt: Any, flags: str = "", fsep: str = RANDOM, **more: Any) -> Row:
    """Return a row with LoRA on experts, which are at home; adapters learn at a higher rate."""
    fast = " --lr 1e-2 --min-lr 1e-2"
    return _row(id, name, flags + fast, fsep + HOMES, adapt=adapt, not_at_home="the same",
        **more)  # fmt: skip


def _muon(id: str, name: str, flags: str, **more: Any) -> Row:
    """Return a row with Muon, which needs experts at home."""
    return _row(id, name, flags, fsep=HOMES, not_at_home="at home in itself", **more)


def _combined(id: str, name: str, flags: str, fsep: str = "", **more: Any) -> Row:
    """Return a row with Megatron's combined 1F1B schedule, which needs bf16 and several ranks.

    So the reference is stock with its plain schedule, and the other stock run has the combined one.
    """
    reference = BF16 + flags.replace(DELAYED, "")
    return _row(id, f"{name}, bf16, accumulation 4", BF16 + flags + COMBINED, fsep, accumulation=4,
        stock=(1, more.get("group", 2)), reference_flags=reference, **more)  # fmt: skip


Pairs = set[tuple[str, str]]


def pairs_of(rows: Iterable[Row]) -> Pairs:
    return {pair for row in rows for pair in combinations_with_replacement(sorted(row.values), 2)}


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
    # Stock's own needs Transformer Engine, so the stock run recomputes nothing.
    _row("act-recompute", "recompute of the experts' activation, with the layer norms",
        fsep=ACT_RECOMPUTE + " layernorm"),
    _row("bf16", "bf16", BF16, steps=LONG),
    _row("bf16-grads", "main gradients in bf16, accumulation 2", BF16 + " --grad-reduce-in-bf16",
        accumulation=2),
    _row("few-tokens", "few tokens: experts, ranks and microbatches without any", FEW_TOKENS,
        ranks=4),
    _row("top1", "top-1", TOP_1),
    _row("even-split", "even split", fsep=" --fsep-split even"),
    _row("greedy", "planner greedy, adaptive", fsep=" --fsep-planner greedy"),
    _row("forecast", "planner greedy, forecast", fsep=" --fsep-planner greedy --fsep-plan-mode"
        " forecast"),
    _row("laer", "planner laer, tolerance 0", fsep=" --fsep-planner laer"
        " --fsep-imbalance-tolerance 0"),
    _row("exact", "fresh layouts after the gate, exact", fsep=EXACT, releases=True),
    _row("exact-nodes", "exact on nodes of 2, E = 8 on 4 ranks", fsep=EXACT + NODES.format(2),
        ranks=4),
    _row("nodes", "exchange through nodes of 2, E = 8 on 4 ranks", fsep=NODES.format(2), ranks=4),
    _row("nodes-dist-opt", "exchange through nodes of 2, full recompute, distributed optimizer,"
        " E = 8 on 4 ranks", DIST_OPT + FULL_RECOMPUTE, fsep=NODES.format(2), ranks=4),
    _row("nodes-virtual", "exchange through nodes of 1, virtual pipeline 2 x 2, accumulation 4",
        VIRTUAL, fsep=NODES.format(1), ranks=4, group=2, accumulation=4),
    _row("nodes-step", "restored once per step through nodes of 2, accumulation 2, bf16, E = 8 on"
        " 4 ranks", BF16, fsep=NODES.format(2) + STEP, ranks=4, accumulation=2),
    _row("announced", "announced by router replay, full recompute, accumulation 2", REPLAY
        + FULL_RECOMPUTE, fsep=ANNOUNCED, accumulation=2),
    _row("announced-pipeline", "announced by router replay, full recompute, pipeline 2,"
        " accumulation 4", REPLAY + PIPELINE + FULL_RECOMPUTE, fsep=ANNOUNCED, ranks=4, group=2,
        accumulation=4, moe_layers=1),
    # Homes by a permutation.
    _row("homes", "permuted homes, distributed optimizer with both overlaps, aux"
        " loss", DIST_OPT + AUX_LOSS + " --moe-aux-loss-coeff 1e-2", fsep=PERMUTED.format(2),
        not_at_home="at home in itself"),
    _row("homes-nodes", "permuted homes, tokens through nodes of 2, top-4, expert"
        " bias, E = 8 on 4 ranks", TOP_4 + SIGMOID_ROUTER, fsep=PERMUTED.format(4)
        + TOKENS.format(2), ranks=4, not_at_home="at home in itself"),
    _row("homes-announced", "permuted homes, announced by router replay,"
        " pipeline 2, accumulation 4, full recompute", REPLAY + PIPELINE + FULL_RECOMPUTE,
        fsep=PERMUTED.format(2) + ANNOUNCED, ranks=4, group=2, accumulation=4, moe_layers=1,
        not_at_home="at home in itself"),
    _row("homes-flex", "permuted homes, flex dispatcher with DeepEP, multi-token"
        " prediction", MTP, fsep=PERMUTED.format(2) + DEEPEP, moe_layers=3,
        not_at_home="at home in itself"),
    _row("scheduler-off", "scheduler off", fsep=SCHEDULER_OFF),
    _row("grouped-mm", "experts' products by grouped_mm", fsep=" --fsep-gemm torch"),
    _row("grouped-mm-step", "experts' products by grouped_mm, bf16, restored once per step", BF16,
        fsep=STEP + " --fsep-gemm torch"),
    # Experts in fp8.
    _row("fp8", "experts in fp8, per-tensor current scaling", FP8, fsep=IN_FP8, bound=FP8_BOUND,
        steps=LONG, not_at_home="at home in itself"),
    _row("fp8-dist-opt", "experts in fp8 (e4m3), per-tensor current scaling, bf16, distributed"
        " optimizer, shared experts, accumulation 2", E4M3 + BF16 + DIST_OPT + SHARED,
        fsep=IN_FP8, bound=FP8_BOUND, accumulation=2, not_at_home="at home in itself"),
    _row("fp8-nodes", "experts in fp8, per-tensor current scaling, exchange through nodes of 2,"
        " restored once per step, accumulation 2, bf16, top-4, E = 8 on 4 ranks", FP8 + BF16
        + TOP_4, fsep=IN_FP8 + NODES.format(2) + STEP, bound=FP8_BOUND, ranks=4, accumulation=2,
        not_at_home="at home in itself"),
    _row("fp8-blocks", "experts in fp8 by blocks, bf16, accumulation 2", BLOCKS + BF16,
        fsep=IN_FP8, bound=FP8_BOUND, accumulation=2, not_at_home="at home in itself"),
    _row("fp8-param", "experts kept in fp8 by blocks, the first layer's in bf16, full recompute",
        BLOCKS + BF16 + DIST_OPT + FULL_RECOMPUTE + FIRST_IN_BF16 + " --fp8-param-gather",
        fsep=IN_FP8, bound=FP8_BOUND, accumulation=2, not_at_home="at home in itself"),
    _row("fp8-bias", "experts in fp8, linear bias, router padding, recompute of the MoE layer",
        E4M3 + PADDING + MOE_RECOMPUTE, fsep=IN_FP8, bound=FP8_BOUND, ranks=4,
        stock=(4, 2), without=NO_BIAS, not_at_home="at home in itself"),
    _row("fp8-flex", "experts in fp8 by blocks, bf16, router padding, flex dispatcher with"
        " HybridEP", BLOCKS + BF16 + PADDING, fsep=IN_FP8 + HYBRIDEP, bound=FP8_BOUND,
        not_at_home="at home in itself"),
    _row("fp8-mx", "experts in mxfp8", MXFP8, fsep=IN_FP8, bound=FP8_BOUND, steps=LONG,
        not_at_home="at home in itself"),
    _row("fp8-mx-recompute", "experts in mxfp8 (hybrid), full recompute, bf16, distributed"
        " optimizer, accumulation 2, shared experts", MXFP8.replace("e4m3", "hybrid") + BF16
        + FULL_RECOMPUTE + DIST_OPT + SHARED, fsep=IN_FP8, bound=FP8_BOUND, accumulation=2,
        exchanges=(6, 2), not_at_home="at home in itself"),
    _row("fp8-mx-nodes", "experts in mxfp8, exchange through nodes of 2, restored once per step,"
        " accumulation 2, bf16, top-4, recompute of the MoE layer, E = 8 on 4 ranks", MXFP8 + BF16
        + TOP_4 + MOE_RECOMPUTE, fsep=IN_FP8 + NODES.format(2) + STEP, bound=FP8_BOUND, ranks=4,
        accumulation=2, exchanges=(4, 2), not_at_home="at home in itself"),
    _row("fp8-mx-param", "experts kept in mxfp8, accumulation 2, bf16", KEPT_IN_MXFP8,
        fsep=IN_FP8, bound=FP8_BOUND, accumulation=2, not_at_home="at home in itself"),
    _row("fp8-mx-homes", "experts kept in mxfp8, permuted homes, accumulation 2, bf16",
        KEPT_IN_MXFP8, fsep=IN_FP8 + PERMUTED.format(2), bound=FP8_BOUND, accumulation=2,
        not_at_home="at home in itself"),
    # Dispatchers.
    _row("deepep", "flex dispatcher with DeepEP", fsep=DEEPEP, releases=True),
    _row("deepep-bf16", "flex dispatcher with DeepEP, bf16, fp32 router, overlapped shared experts",
        BF16 + FP32_ROUTER + SHARED + OVERLAPPED, fsep=DEEPEP),
    _row("deepep-shared", "flex dispatcher with DeepEP, recompute of the MoE layer, shared"
        " experts, E = 8 on 4 ranks", MOE_RECOMPUTE + SHARED, fsep=DEEPEP, ranks=4),
    _row("hybridep", "flex dispatcher with HybridEP", fsep=HYBRIDEP, capacity=6, releases=True),
    _row("hybridep-padded", "flex dispatcher with HybridEP, padded inputs, fused permutation,"
        " recompute of the MoE layer, overlapped shared experts, E = 8 on 4 ranks", MOE_RECOMPUTE
        + SHARED + OVERLAPPED + " --moe-hybridep-pad-uneven-dispatch-inputs"
        " --moe-permute-fusion-into-hybridep", fsep=HYBRIDEP, ranks=4),
    # Tokens by nodes: two stages with nodes of 2 on 4 ranks, otherwise one.
    _row("tokens-nodes1", "tokens through nodes of 1", fsep=TOKENS.format(1), steps=LONG,
        releases=True),
    _row("tokens-nodes2", "tokens through nodes of 2, top-4, E = 8 on 4 ranks", TOP_4,
        fsep=TOKENS.format(2), ranks=4, steps=LONG, releases=True),
    _row("tokens-one-node", "tokens through one node of 4, top-4, E = 6 on 4 ranks", TOP_4,
        fsep=TOKENS.format(4), ranks=4, experts=6, stock=(1, 2), reference_ranks=1),
    _row("tokens-exact", "tokens and experts through nodes of 2, exact, bf16, top-4, E = 8 on 4"
        " ranks", TOP_4 + BF16, fsep=EXACT + " --fsep-token-exchange node" + NODES.format(2),
        ranks=4, not_at_home="bf16 sums of nodes flip a near-tie: 4.9e-2, 5.6e-3 given stock's"
        " choices"),
    _row("tokens-few", "tokens through nodes of 2, few tokens: experts, ranks and microbatches"
        " without any", FEW_TOKENS, fsep=TOKENS.format(2), ranks=4),
    _row("tokens-shared", "tokens through nodes of 2, shared experts, full recompute, distributed"
        " optimizer, accumulation 2, E = 8 on 4 ranks", DIST_OPT + FULL_RECOMPUTE + SHARED,
        fsep=TOKENS.format(2), ranks=4, accumulation=2),
    _row("tokens-gated", "tokens through nodes of 2, shared experts with a gate and overlap, E = 8"
        " on 4 ranks", GATED + OVERLAPPED, fsep=TOKENS.format(2), ranks=4),
    _row("tokens-mtp", "tokens through nodes of 2, recompute of the MoE layer and its overlapped"
        " shared experts, multi-token prediction, aux losses, E = 8 on 4 ranks", AUX_LOSSES
        + MOE_RECOMPUTE + MTP + SHARED + OVERLAPPED, fsep=TOKENS.format(2), ranks=4, moe_layers=3),
    _row("tokens-tensor", "tokens through nodes of 2, tensor parallel 2 with sequence parallel,"
        " fp32 router, bf16", TENSOR + BF16 + FP32_ROUTER, fsep=TOKENS.format(2), ranks=4,
        stock=(4, 2)),
    _row("tokens-latent", "tokens through nodes of 1, latent MoE without a gate, shared experts",
        SQUARED_RELU + " --moe-latent-size 24" + SHARED, fsep=TOKENS.format(1), without="--swiglu"),
    _row("tokens-bias", "tokens through nodes of 2, linear bias without a gate, probabilities"
        " applied on input, top-1, scheduler off", SQUARED_RELU + " --moe-apply-probs-on-input"
        + TOP_1, fsep=TOKENS.format(2) + SCHEDULER_OFF, ranks=4, stock=(4, 2),
        without=NO_BIAS_NOR_SWIGLU),
    _row("tokens-virtual", "tokens through nodes of 1, virtual pipeline 2 x 2, accumulation 4,"
        " restored once per step", VIRTUAL, fsep=TOKENS.format(1) + STEP, ranks=4, group=2,
        accumulation=4),
    _row("tokens-router", "tokens through nodes of 1, router in fp64 with groups and expert bias,"
        " recompute of the experts' activation", GROUPS, fsep=TOKENS.format(1) + ACT_RECOMPUTE),
    _row("step", "restored once per step, accumulation 4", fsep=STEP, accumulation=4),
    _row("step-dist-opt", "restored once per step, accumulation 4, distributed optimizer", DIST_OPT,
        fsep=STEP, accumulation=4),
    _row("step-bf16", "restored once per step, bf16, accumulation 4", BF16, fsep=STEP,
        accumulation=4),
    _row("even-split-4", "even split, E = 8 on 4 ranks", fsep=" --fsep-split even", ranks=4),
    _row("most-slots", "most slots", capacity=8),
    _row("fewest-slots", "fewest slots", capacity=4),
    _row("e8-on-4", "E = 8 on 4 ranks", ranks=4, steps=LONG),
    _row("e8-on-4-dist-opt", "E = 8 on 4 ranks, distributed optimizer", DIST_OPT, ranks=4,
        stock=(4, 2)),
    _row("e6-on-4", "E = 6 on 4 ranks", ranks=4, experts=6, stock=(1, 2), reference_ranks=1,
        steps=LONG),
    # With Adam's default of 1e-8 one gradient in 6144 is so near to zero that rounding moves its
    # weight by 4e-6. Neither stock run happens to show that.
    _row("e3-on-4", "E = 3 on 4 ranks", " --adam-eps 1e-6", ranks=4, experts=3, stock=(1, 1),
        reference_ranks=1, steps=LONG),
    _row("edp", "expert data parallel 2", ranks=4, group=2, steps=LONG),
    _row("edp-dist-opt", "expert data parallel 2, distributed optimizer", DIST_OPT, ranks=4,
        group=2),
    _row("tensor", "tensor parallel 2 with sequence parallel", TENSOR, ranks=4, stock=(4, 2),
        releases=True),
    _row("tensor-edp", "tensor parallel 2, expert data parallel 2, distributed optimizer", TENSOR
        + DIST_OPT, ranks=4, group=2, stock=(2, 4)),
    _row("pipeline", "pipeline 2", PIPELINE, ranks=4, group=2, steps=LONG, moe_layers=1),
    _row("virtual", "virtual pipeline 2 x 2, accumulation 4", VIRTUAL, ranks=4, group=2,
        accumulation=4, releases=True),
    _row("step-pipeline", "restored once per step through nodes of 1, pipeline 2, accumulation 4",
        PIPELINE, fsep=NODES.format(1) + STEP, ranks=4, group=2, accumulation=4, moe_layers=1),
    _row("wire-fp32", "exchange through nodes of 2, fp32 on the wire, pipeline 2, accumulation 4,"
        " bf16, E = 8 on 8 ranks", PIPELINE + BF16, fsep=NODES.format(2)
        + " --fsep-grad-wire-dtype fp32", ranks=8, group=4, stock=(4, 2), accumulation=4,
        moe_layers=1),
    _row("step-virtual", "restored once per step, virtual pipeline 2 x 2, accumulation 4", VIRTUAL,
        fsep=STEP, ranks=4, group=2, accumulation=4),
    _row("recompute-pipeline", "full recompute, pipeline 2, accumulation 4", PIPELINE
        + FULL_RECOMPUTE, ranks=4, group=2, accumulation=4, steps=LONG, moe_layers=1),
    # Megatron-FSDP. Where experts have one replica and microbatches are several, its gradients of
    # stock's experts are wrong but for `optim`, so the reference has DDP.
    _fsdp("fsdp", "optim_grads_params", ""),
    _fsdp("fsdp-optim", "optim", ", with both overlaps", DIST_OPT),
    _fsdp("fsdp-accum", "optim_grads_params", ", full recompute, shared experts, accumulation 2",
        FULL_RECOMPUTE + SHARED, accumulation=2, stock=(2, 1),
        reference_flags=DIST_OPT + FULL_RECOMPUTE + SHARED),
    _fsdp("fsdp-moe", "optim_grads", ", recompute of the MoE layer, shared experts, accumulation 4"
        ", E = 8 on 4 ranks", MOE_RECOMPUTE + SHARED, ranks=4, accumulation=4, stock=(4, 1),
        reference_flags=DIST_OPT + MOE_RECOMPUTE + SHARED),
    _fsdp("fsdp-edp", "optim_grads_params", ", expert data parallel 2, both overlaps, full"
        " recompute, shared experts, accumulation 2", DIST_OPT + FULL_RECOMPUTE + SHARED, ranks=4,
        group=2, accumulation=2, stock=(1, 2)),
    _fsdp("fsdp-edp-grads", "optim_grads", ", bf16, expert data parallel 2, recompute of the MoE"
        " layer, shared experts, accumulation 2", BF16 + MOE_RECOMPUTE + SHARED, ranks=4, group=2,
        accumulation=2, stock=(1, 2)),
    _fsdp("fsdp-exact", "optim_grads_params", ", exact, tokens and experts through nodes of 2,"
        " scheduler off, E = 8 on 4 ranks", fsep=EXACT + TOKENS.format(2) + SCHEDULER_OFF
        + " --fsep-restore-algorithm node", ranks=4),
    _fsdp("fsdp-step", "optim", ", restored once per step, full recompute, shared experts,"
        " per-token loss, expert data parallel 2, accumulation 2", FULL_RECOMPUTE + SHARED
        + PER_TOKEN, fsep=STEP, ranks=4, group=2, accumulation=2, stock=(1, 2)),
    _fsdp("fsdp-tensor", "optim_grads_params", ", tensor parallel 2, expert data parallel 2",
        TENSOR, ranks=4, group=2, stock=(1, 2)),
    _fsdp("fsdp-context", "optim_grads_params", ", context parallel 2, expert data parallel 2",
        CONTEXT, ranks=4, group=2, stock=(1, 2)),
    # Losses and routers.
    _row("losses", "aux, sequence, global and z losses, accumulation 2", AUX_LOSSES, accumulation=2,
        releases=True),
    _row("losses-block", "the same losses, full recompute of one layer in two", AUX_LOSSES
        + BLOCK_RECOMPUTE, accumulation=2),
    _row("losses-moe-recompute", "the same losses, recompute of the MoE layer, per-token loss",
        AUX_LOSSES + MOE_RECOMPUTE + PER_TOKEN, accumulation=2),
    _row("sinkhorn", "sinkhorn router", " --moe-router-load-balancing-type sinkhorn"),
    _row("quantile", "quantile balancing with a moving average, accumulation 2",
        " --moe-router-load-balancing-type quantile_balancing --moe-router-quantile-balancing-ema"
        " 0.5", accumulation=2),
    _row("groups", "group-limited sigmoid router in fp64 with expert bias, scaling and sequence"
        " aux loss", GROUPS + " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff"
        " 1e-4"),
    _row("forced-balance", "forced balance, input jitter", " --moe-router-force-load-balancing"
        " --moe-input-jitter-eps 1e-1"),
    _row("forced-bias", "forced bias that stays, recompute of the MoE layer",
        " --moe-router-force-biased -1" + MOE_RECOMPUTE),
    _row("fused", "fused router and permutation, aux, sequence, global and z losses", AUX_LOSSES
        + " --moe-router-fusion --moe-permute-fusion"),
    _row("replay", "router replay, full recompute, accumulation 2", REPLAY + FULL_RECOMPUTE,
        accumulation=2),
    _row("softplus", "square-root softplus router", " --moe-router-score-function sqrtsoftplus"),
    # Models.
    _row("gated-shared", "shared experts with a gate and overlap", GATED + OVERLAPPED,
        releases=True),
    _row("gated-recompute", "shared experts with a gate, recompute of the MoE layer", GATED
        + MOE_RECOMPUTE),
    _row("dense-first", "first layer dense, recompute of attention, norms, dense and shared"
        " experts", " --num-layers 3 --moe-layer-freq ([0]*1+[1]*2) --moe-ffn-hidden-size 40"
        + SHARED + SELECTIVE + " core_attn layernorm mlp shared_experts"),
    _row("mtp", "multi-token prediction with aux losses", AUX_LOSSES + MTP, moe_layers=3,
        releases=True),
    _row("mtp2", "repeated MTP layer, depth 2, aux losses, distributed optimizer, accumulation 2",
        AUX_LOSSES + DIST_OPT + REPEATED + "2", accumulation=2, moe_layers=3, exchanges=(6, 4)),
    _row("mtp3-exact", "repeated MTP layer, depth 3, exact, recompute of the MoE layer, shared"
        " experts", MOE_RECOMPUTE + REPEATED + "3" + SHARED, fsep=EXACT, moe_layers=3,
        exchanges=(6, 5),
        not_at_home="rounding flips a near-tie: 3.0e-5, 0.0 given stock's choices"),
    _row("mtp2-step", "repeated MTP layer, depth 2, restored once per step, forecast, bf16,"
        " accumulation 2", BF16 + REPEATED + "2", fsep=" --fsep-planner greedy --fsep-plan-mode"
        " forecast" + STEP, accumulation=2, moe_layers=3),
    _row("mtp2-pipeline", "repeated MTP layer, depth 2, adaptive, full recompute, pipeline 2,"
        " accumulation 2", PIPELINE + FULL_RECOMPUTE + REPEATED + "2", fsep=" --fsep-planner"
        " greedy --fsep-imbalance-tolerance 0.02", ranks=4, group=2, accumulation=2, moe_layers=1),
    _row("latent-attention", "latent attention, recompute of its up-projections", LATENT_ATTENTION
        + " --rope-type rope" + LATENT_RECOMPUTE),
    _row("delta-net", "gated delta net before attention, recompute of its output norm",
        " --spec tests.specs.gated_delta_net block_spec --experimental-attention-variant"
        " gated_delta_net --linear-attention-freq 2 --linear-key-head-dim 8"
        " --linear-value-head-dim 12 --linear-num-key-heads 2 --linear-num-value-heads 4"
        + SELECTIVE + " gdn_norm_out"),
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
    _row("qwen3", "as Qwen3: grouped and normalised queries, top-4, aux loss, fp32 router, tensor"
        " parallel 2, flex dispatcher with DeepEP, recompute of norms and of the experts'"
        " activation", TENSOR + DIST_OPT + GROUPED_QUERIES + AUX_LOSS + " --qk-layernorm"
        " --kv-channels 16 --moe-aux-loss-coeff 1e-3" + TOP_4 + FP32_ROUTER
        + " --moe-ffn-hidden-size 40", fsep=DEEPEP + ACT_RECOMPUTE + " layernorm", ranks=4,
        stock=(4, 2)),
    _row("glm", "as GLM-4.5: first layer dense, overlapped shared experts, sigmoid router with"
        " expert bias, biased and normalised queries, multi-token prediction, recompute of"
        " attention", DIST_OPT + GROUPED_QUERIES + FIRST_LAYER_DENSE + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-3" + SHARED + OVERLAPPED + " --add-qkv-bias --qk-layernorm"
        " --rotary-percent 0.5" + MTP + " --mtp-loss-scaling-factor 0.3 --recompute-granularity"
        " selective", moe_layers=3),
    _row("gpt-oss", "as gpt-oss: linear bias, clamped and offset quick-GEGLU, learned softmax,"
        " windows, top-4, aux loss, fp32 router", DIST_OPT + CLAMPED_GEGLU + GROUPED_QUERIES
        + AUX_LOSS + " --softmax-type learnable --window-size 15,0 --window-attn-skip-freq 2"
        " --moe-aux-loss-coeff 1e-3" + TOP_4 + FP32_ROUTER, ranks=4, stock=(4, 2),
        without=NO_BIAS_NOR_SWIGLU),
    # No Mamba layers, for which Megatron has only GPU kernels.
    _row("nemotron", "as Nemotron-3: HybridModel, latent MoE without a gate, shared experts,"
        " sigmoid router with expert bias, repeated multi-token prediction, flex dispatcher with"
        " HybridEP", DIST_OPT + HYBRID + "*E-*E/*E/*E --mtp-use-repeated-layer" + SQUARED_RELU
        + " --moe-latent-size 24" + SIGMOID_ROUTER + " --moe-aux-loss-coeff 1e-4"
        " --moe-router-topk-scaling-factor 5.0" + SHARED + " --calculate-per-token-loss",
        fsep=HYBRIDEP, without="--swiglu", capacity=6, moe_layers=3, exchanges=(6, 4)),
    _row("clamp", "clamped and offset quick-GEGLU", CLAMPED_GEGLU, without="--swiglu"),
    # With one expert-parallel rank, Megatron's local layers cannot train an expert's bias.
    # With three slots at home, rounding decides a value at the clamp in step 44: losses are 4.4e-7
    # apart, weights 1.2e-3.
    _row("bias-clamp", "linear bias, clamped and offset quick-GEGLU", CLAMPED_GEGLU, ranks=4,
        stock=(4, 2), without=NO_BIAS_NOR_SWIGLU, steps=LONG, capacity=4),
    _row("bias-dist-opt", "linear bias, distributed optimizer, expert data parallel 2,"
        " accumulation 2", DIST_OPT, ranks=4, group=2, stock=(2, 4), accumulation=2,
        without=NO_BIAS),
    _row("bias-tensor", "linear bias, tensor parallel 2 with sequence parallel, per-token loss",
        TENSOR + PER_TOKEN, ranks=4, stock=(4, 2), without=NO_BIAS),
    _row("bias-pipeline", "linear bias, recompute of the MoE layer, pipeline 2, accumulation 2",
        PIPELINE + MOE_RECOMPUTE, ranks=4, group=2, stock=(2, 2), reference_ranks=2,
        reference_flags=MOE_RECOMPUTE, accumulation=2, without=NO_BIAS, moe_layers=1),
    _row("bias-act-recompute", "linear bias, recompute of the experts' activation, through nodes"
        " of 2, E = 6 on 4 ranks", CLAMPED_GEGLU, fsep=NODES.format(2) + ACT_RECOMPUTE, ranks=4,
        experts=6, stock=(2, 2), reference_ranks=2, without=NO_BIAS_NOR_SWIGLU),
    _row("bias-step", "linear bias, restored once per step, bf16, accumulation 4", CLAMPED_GEGLU
        + BF16, fsep=STEP, ranks=4, group=2, stock=(4, 2), accumulation=4,
        without=NO_BIAS_NOR_SWIGLU),
    _row("bias-top1", "linear bias without a gate, probabilities applied on input, top-1,"
        " scheduler off", SQUARED_RELU + " --moe-apply-probs-on-input" + TOP_1, fsep=SCHEDULER_OFF,
        ranks=4, stock=(4, 2), without=NO_BIAS_NOR_SWIGLU),
    _row("probs-on-input", "probabilities applied on input, top-1", " --moe-apply-probs-on-input"
        + TOP_1),
    _row("latent-moe", "latent MoE without a gate, shared experts", SQUARED_RELU
        + " --moe-latent-size 24" + SHARED, without="--swiglu"),
    _row("tied", "tied embeddings, bf16, distributed optimizer, full recompute", BF16 + DIST_OPT
        + FULL_RECOMPUTE, without=UNTIED),
    _row("hybrid", "HybridModel of attention, dense and MoE layers, aux losses, shared experts,"
        " distributed optimizer", AUX_LOSSES + DIST_OPT + HYBRID + "*E-*E" + SHARED),
    _row("hybrid-mtp", "HybridModel, two MoE layers repeated by multi-token prediction, full"
        " recompute, exact", FULL_RECOMPUTE + HYBRID + "*-E/*E-E/*E-E --mtp-use-repeated-layer",
        fsep=EXACT, moe_layers=3, exchanges=(10, 5)),
    _row("hybrid-virtual", "HybridModel, virtual pipeline 2 x 2, multi-token prediction,"
        " accumulation 2", PIPELINE + HYBRID + "*E|E-|*E|-E/*E/*E", ranks=4, group=2,
        accumulation=2),
    # Parallelism.
    _row("context", "context parallel 2 with aux losses", AUX_LOSSES + CONTEXT, ranks=4,
        stock=(2, 4), reference_ranks=2, reference_flags=AUX_LOSSES),
    _row("instances", "distributed optimizer in 2 instances, expert data parallel 2", DIST_OPT
        + " --num-distributed-optimizer-instances 2", ranks=4, group=2, gradients=False),
    _row("tensor-freq", "tensor parallel 2, MoE in every second layer, aux losses, overlapped"
        " shared experts", TENSOR + AUX_LOSSES + " --num-layers 4 --moe-layer-freq 2" + SHARED
        + OVERLAPPED, ranks=4, stock=(4, 2)),
    _row("pipeline-dense", "pipeline 2 whose first stage has no MoE layer, aux losses,"
        " accumulation 2", PIPELINE + AUX_LOSSES + " --num-layers 4 --moe-layer-freq ([0]*2+[1]*2)",
        ranks=4, group=2, accumulation=2, moe_layers=0),
    _row("pipeline-mtp", "pipeline 2 with multi-token prediction and tied embeddings, accumulation"
        " 2", PIPELINE + MTP, ranks=4, group=2, accumulation=2, without=UNTIED, moe_layers=1),
    # Megatron's combined 1F1B schedule, which runs with bf16 alone.
    _combined("combined", "combined 1F1B, shared experts", SHARED),
    _combined("combined-virtual", "combined 1F1B, virtual pipeline 2 x 2, multi-token prediction",
        VIRTUAL + MTP, ranks=4, group=2),
    _combined("combined-fp8", "combined 1F1B, experts in fp8 by blocks", BLOCKS, IN_FP8,
        bound=FP8_BOUND, not_at_home="at home in itself"),
    _combined("delayed", "combined 1F1B, delayed weight gradients, shared experts, both"
        " overlaps", SHARED + DELAYED + DIST_OPT),
    _combined("delayed-virtual", "combined 1F1B, delayed weight gradients, virtual pipeline 2 x 2,"
        " multi-token prediction", VIRTUAL + MTP + DELAYED, ranks=4, group=2),
    _combined("delayed-exact", "combined 1F1B, delayed weight gradients, exact, DeepEP, recompute"
        " of norms, activations and shared experts",
        SHARED + DELAYED, fsep=EXACT + DEEPEP + ACT_RECOMPUTE + " layernorm shared_experts"),
    _combined("delayed-step", "combined 1F1B, delayed weight gradients, restored once per step,"
        " tokens through nodes of 2", DELAYED, fsep=TOKENS.format(2) + STEP, ranks=4, group=4),
    _combined("delayed-graphs", "combined 1F1B, delayed weight gradients, CUDA graphs of router and"
        " counts, shared experts", SHARED + DELAYED,
        fsep=GRAPHS + " moe_router moe_preprocess"),
    _row("dispatch-wgrad", "experts' weight gradients during the dispatch's backward, accumulation"
        " 2", BEHIND_DISPATCH, accumulation=2),
    _row("dispatch-wgrad-off", "experts' weight gradients during the dispatch's backward, scheduler"
        " off", BEHIND_DISPATCH, fsep=" --fsep-scheduler off"),
    # Frozen weights.
    _row("lora", "LoRA on attention, distributed optimizer", DIST_OPT + " --lr 1e-2 --min-lr 1e-2",
        exchanges=(4, 0), adapt=lora_on_attention),
    _row("lora-step", "LoRA on attention, full recompute, restored once per step, accumulation 2,"
        " bf16", FULL_RECOMPUTE + BF16 + " --lr 1e-2 --min-lr 1e-2", fsep=STEP, accumulation=2,
        exchanges=(2, 0), adapt=lora_under_recompute),
    # LoRA on experts at home, as Megatron-Bridge adds it.
    _lora("lora-experts", "LoRA on experts, distributed optimizer", lora_on_experts, DIST_OPT),
    _lora("lora-fc1", "LoRA on experts' first layers, exact", lora_on_first_layers, fsep=EXACT),
    _lora("lora-fc2", "LoRA on experts' second layers, adaptive, shared experts",
        lora_on_second_layers, SHARED, " --fsep-plan-mode adaptive"),
    _lora("lora-canonical", "canonical LoRA on experts, tokens through nodes of 2, E = 8 on 4"
        " ranks", canonical_lora_on_experts, "", RANDOM + TOKENS.format(2), ranks=4),
    _lora("lora-bf16", "LoRA on experts, announced, full recompute, bf16, accumulation 2",
        lora_on_experts_under_recompute, BF16 + REPLAY + FULL_RECOMPUTE, ANNOUNCED,
        accumulation=2),
    _lora("lora-all", "LoRA on attention and experts, exchange through nodes of 2, restored once"
        " per step, accumulation 2", lora_on_attention_and_experts, fsep=RANDOM + STEP
        + NODES.format(2), ranks=4, accumulation=2),
    _lora("lora-tensor", "LoRA on experts with linear bias, tensor parallel 2, expert data"
        " parallel 2", lora_on_experts, TENSOR, ranks=4, group=2, without=NO_BIAS),
    _row("frozen", "first layer and first matrix of experts frozen, recompute of the MoE layer,"
        " distributed optimizer, accumulation 2", MOE_RECOMPUTE + DIST_OPT, accumulation=2,
        exchanges=(3, 1), adapt=frozen_in_part),
    # Graphs, by the sets of modules that published recipes capture.
    _row("graphs", "CUDA graphs of router and counts, shared experts, distributed optimizer,"
        " recompute of norms", DIST_OPT + SHARED, fsep=SELECTIVE + " layernorm" + GRAPHS
        + " moe_router moe_preprocess", at_night=LONGEST),
    _row("graphs-attention", "CUDA graphs of attention, router and counts, flex dispatcher with"
        " HybridEP, accumulation 2", fsep=HYBRIDEP + GRAPHS + " attn moe_router moe_preprocess",
        accumulation=2, capacity=6, at_night=LONGEST),
    _row("graphs-dense", "CUDA graphs of attention, dense layers, router and counts, flex"
        " dispatcher with DeepEP, gated shared experts", FIRST_LAYER_DENSE + GATED + FP32_ROUTER,
        fsep=DEEPEP + GRAPHS + " attn mlp moe_router moe_preprocess", at_night=LONGEST),
    _row("graphs-hybrid", "CUDA graphs of HybridModel's attention, router and counts, latent MoE"
        " without a gate, shared experts", HYBRID + "*E-*E" + SQUARED_RELU + " --moe-latent-size"
        " 24" + SHARED, fsep=GRAPHS + " attn moe_router moe_preprocess", without="--swiglu",
        at_night=LONGEST),
    _row("graphs-tokens", "CUDA graphs of attention, router and counts, pipeline 2, tokens through"
        " nodes of 2, overlapped shared experts, accumulation 2", PIPELINE + SHARED + OVERLAPPED,
        fsep=TOKENS.format(2) + GRAPHS + " attn moe_router moe_preprocess", ranks=4, group=2,
        accumulation=2, moe_layers=1, at_night=LONGEST),
    _row("graphs-recompute", "CUDA graphs of attention, recompute of the MoE layer",
        MOE_RECOMPUTE, fsep=GRAPHS + " attn", at_night=LONGEST),
    # Runs.
    # Without fp8 Megatron itself refuses it.
    _row("padding", "router padding, without effect",
        fsep=PADDING),
    _row("offload", "optimizer offloaded to the CPU, expert data parallel 2", OFFLOADED, ranks=4,
        group=2),
    _row("offload-half", "half of the optimizer offloaded to the CPU with both copies overlapped",
        OFFLOADED + " --optimizer-offload-fraction 0.5 --overlap-cpu-optimizer-d2h-h2d"),
    _row("sgd", "SGD with momentum", " --optimizer sgd --sgd-momentum 0.9 --lr 5e-2 --min-lr 5e-2"),
    _row("lion", "Lion", " --optimizer lion", bound=LION_BOUND),
    _muon("muon", "Muon", MUON),
    _muon("muon-options", "Muon with Nesterov momentum, other scales, coefficients, and"
        " tensor-parallel mode", MUON + " --muon-nesterov --muon-momentum 0.95 --muon-scale-mode"
        " unit_rms_norm --muon-extra-scale-factor 0.2 --muon-coefficient-type polar_express"
        " --muon-num-ns-steps 8 --muon-tp-mode distributed --muon-no-split-qkv"),
    _muon("muon-bf16", "Muon, bf16, accumulation 2, shared experts", MUON_BF16 + SHARED,
        accumulation=2),
    _muon("muon-tensor", "Muon, tensor parallel 2, linear bias", MUON + TENSOR + " --muon-tp-mode"
        " duplicated", ranks=4, stock=(4, 2), without=NO_BIAS),
    _muon("dist-muon", "dist_muon with both overlaps, expert data parallel 2, bf16", MUON_SHARED
        + " --overlap-grad-reduce --overlap-param-gather", ranks=4, group=2),
    _muon("dist-muon-pipeline", "dist_muon, expert data parallel 2, pipeline 2, bf16, accumulation"
        " 2", MUON_SHARED + PIPELINE, ranks=4, group=2, accumulation=2, moe_layers=1),
    _row("evaluation", "evaluation and hashes of weights between steps, expert data parallel 2",
        " --eval-interval 4 --eval-iters 2 --check-weight-hash-across-dp-replicas-interval 2",
        ranks=4, group=2, evaluations=4),
    _row("evaluate-only", "evaluation alone", " --skip-train --eval-iters 2", steps=0,
        evaluations=1, gradients=False),
]
# fmt: on

HOME_ROWS = [row.at_home for row in ROWS if row.needs_rows is None]
ALL_ROWS = [*ROWS, *HOME_ROWS]


@cache
def daily() -> frozenset[str]:
    """Return ids of rows with all of `pairs_of(ALL_ROWS)`, with those that older releases run too.

    Choose greedily the most new pairs per rank, then drop rows that others make redundant.
    """
    pairs = {row.id: pairs_of([row]) for row in ALL_ROWS}
    chosen = [row for row in ALL_ROWS if row.releases]
    left = pairs_of(ALL_ROWS) - pairs_of(chosen)
    while left:
        chosen.append(max(ALL_ROWS, key=lambda row: len(pairs[row.id] & left) / row.ranks))
        left -= pairs[chosen[-1].id]
    for row in sorted(chosen, key=lambda row: (len(pairs[row.id]), row.id)):
        others = [other for other in chosen if other is not row]
        if not row.releases and pairs[row.id] <= pairs_of(others):
            chosen = others
    return frozenset(row.id for row in chosen)
