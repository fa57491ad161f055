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
from tests.parity.bridge_lora import lora_of_each_kind, lora_on_experts_under_recompute
from tests.parity.flags import UNFUSED
from tests.parity.row import AT_HOME, HOMES, LONG, LONGEST, Row

RANDOM = " --fsep-planner random"
STEP = " --fsep-restore step"
NODES = " --fsep-node-size {} --fsep-set restore_algorithm=node"
RELAYED = f" --fsep-node-size 2 --fsep-set cluster={Path(__file__).with_name('relay_pays.yaml')}"
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

    flags: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


# fmt: off
DEPTH_3 = Common(DIST_OPT + AUX_LOSSES + MOE_RECOMPUTE + SHARED + PER_TOKEN + REPEATED + "3",
    {"exchanges": (6, 5)})
RECOMPUTED = Common(DIST_OPT + REPLAY + FULL_RECOMPUTE + SHARED + PER_TOKEN
    + " --moe-router-score-function sqrtsoftplus", {"ranks": 4, "accumulation": 2})
# As published recipes train it.
GLM = Common(BF16 + DIST_OPT + GROUPED_QUERIES + FIRST_LAYER_DENSE + SIGMOID_ROUTER
    + " --moe-aux-loss-coeff 1e-3" + SHARED + OVERLAPPED + " --add-qkv-bias --qk-layernorm"
    " --rotary-percent 0.5" + MTP + " --mtp-loss-scaling-factor 0.3 --recompute-granularity"
    " selective")
LAYER_RECOMPUTED = Common(AUX_LOSSES + MOE_RECOMPUTE + MTP + GATED + OVERLAPPED, {"ranks": 4})
ROUTED_TO_4 = Common(TOP_4 + SIGMOID_ROUTER, {"ranks": 4})
GROUPED = Common(FIRST_LAYER_DENSE + BEHIND_DISPATCH + GATED + GROUPS
    + " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4"
    + SELECTIVE + " core_attn layernorm mlp shared_experts")
HYBRID_MODEL = Common(AUX_LOSSES + DIST_OPT + HYBRID + "*E-*E" + SQUARED_RELU + LATENT_MOE + SHARED,
    {"without": "--swiglu"})
IN_BF16 = Common(BF16 + DIST_OPT + SHARED + FP32_ROUTER, {"accumulation": 4, "stock": (1, 2)})
IN_BF16_ON_4 = Common(BF16 + HALF_DENSE, {"ranks": 4, "accumulation": 4, "stock": (1, 4)})
TENSOR_PARALLEL = Common(TENSOR + AUX_LOSSES + " --num-layers 4 --moe-layer-freq 2" + SHARED
    + OVERLAPPED + " --moe-router-fusion --moe-permute-fusion" + PER_TOKEN,
    {"ranks": 4, "stock": (4, 2)})
IN_PIPELINE = Common(PIPELINE + MOE_RECOMPUTE, {"ranks": 4, "group": 2, "stock": (2, 2),
    "reference_ranks": 2, "reference_flags": MOE_RECOMPUTE, "accumulation": 2, "without": NO_BIAS})
# Megatron-Bridge's recipes for Blackwell in small sizes, without graphs, fused operations and
# forced balance. In a pipeline, overlapped reduces would leave parts of the compared gradients.
# HybridEP rounds a rank's sums of experts to bf16, which flips near-ties: with top-4 gradients
# are up to 1.8e-1 apart. So rows have top-2, or top-4 with these sums in fp32.
DEEPSEEK_V3 = Common(BF16 + MXFP8 + VIRTUAL + " --use-distributed-optimizer" + TOP_4
    + LATENT_ATTENTION + " --moe-layer-freq ([0]*1+[1]*3) --moe-ffn-hidden-size 32" + SIGMOID_ROUTER
    + " --moe-aux-loss-coeff 1e-4 --moe-router-num-groups 4 --moe-router-group-topk 2"
    " --moe-router-topk-scaling-factor 2.5" + SHARED + MTP + LATENT_RECOMPUTE,
    {"accumulation": 4, "ranks": 4, "stock": (1, 2), "without": UNFUSED})
QWEN3 = Common(BF16 + MXFP8_KEPT + DIST_OPT + GROUPED_QUERIES + AUX_LOSS
    + " --qk-layernorm --kv-channels 16 --moe-aux-loss-coeff 1e-3" + FP32_ROUTER
    + " --moe-router-fusion --moe-permute-fusion", {"accumulation": 4, "stock": (1, 2),
    "without": UNFUSED})
GPT_OSS = Common(BF16 + MXFP8_KEPT + DIST_OPT + CLAMPED_GEGLU + GROUPED_QUERIES + AUX_LOSS
    + " --moe-aux-loss-coeff 1e-3 --softmax-type learnable --window-size 15,0"
    " --window-attn-skip-freq 2" + FP32_ROUTER, {"accumulation": 4, "ranks": 4, "stock": (4, 2),
    "without": f"{UNFUSED} {NO_BIAS_NOR_SWIGLU}"})
LORA_OF_EACH_KIND = Common(SHARED + " --num-layers 3" + FAST, {"ranks": 4, "accumulation": 2,
    "adapt": lora_of_each_kind})
# fmt: on


def _row(id: str, flags: str = "", fsep: str = "", **more: Any) -> Row:
    """Return a row with common defaults: random layouts, and a bound by precision."""
    ranks, group = more.get("ranks", 2), more.pop("group", None)
    return Row(
        id,
        flags,
        fsep if "--fsep-plan" in fsep or PRESET in fsep else RANDOM + fsep,
        stock_parallel=more.pop("stock", (group or ranks, 1)),
        expert_parallel=group,
        **more,
    )


def _fsdp(id: str, strategy: str, flags: str = "", fsep: str = "", **more: Any) -> Row:
    """Return a row with dense layers sharded by Megatron-FSDP, and experts at home."""
    flags = FSDP + strategy + flags.replace(" --use-distributed-optimizer", "")
    return _row(id, flags, AT_HOME + fsep, **more)


def _combined(id: str, flags: str, fsep: str = "", **more: Any) -> Row:
    """Return a row with Megatron's combined 1F1B schedule, which needs bf16 and several ranks.

    So the reference is stock with its plain schedule, and the other stock run has the combined one.
    """
    reference = BF16 + flags.replace(DELAYED, "")
    return _row(id, BF16 + flags + COMBINED, fsep, accumulation=4, stock=(1, more.get("group", 2)),
        reference_flags=reference, **more)  # fmt: skip


def _on(common: Common, id: str, fsep: str = "", **more: Any) -> Row:
    """Return a row with these flags of both sides, and its own of FSEP's."""
    return _row(id, common.flags, fsep, **common.sizes | more)


def _recipe(common: Common, id: str, **more: Any) -> Row:
    """Return a row with a recipe's schedule and dispatcher, which the reference lacks."""
    row = _on(common, f"recipe-{id}", IN_FP8 + HYBRIDEP, reference_flags=common.flags, **more)
    return replace(row, flags=row.flags + DELAYED + COMBINED)


# A row: its id, flags of both sides, and differences from the defaults of `Row`.
# fmt: off
ROWS = [
    _row("plain", steps=LONG),
    _row("dist-opt", DIST_OPT, steps=LONG),
    _row("accum", accumulation=4, steps=LONG),
    _row("bf16", BF16, steps=LONG),
    _row("bf16-grads", BF16 + " --grad-reduce-in-bf16", accumulation=2),
    # Experts, ranks and microbatches without any token.
    _row("few-tokens", FEW_TOKENS, ranks=4),
    _row("top1", TOP_1),
    # Without fp8 Megatron itself refuses the padding, which has no effect.
    _row("even-split", fsep=" --fsep-set split=even" + PADDING, capacity=8),
    _row("greedy", fsep=" --fsep-planner greedy --fsep-plan-mode adaptive"
        " --fsep-set imbalance_tolerance=0.02"),
    _row("forecast", fsep=" --fsep-planner greedy --fsep-plan-mode forecast"),
    _on(ROUTED_TO_4, "preset", PRESET, capacity=4),
    _row("preset-virtual", VIRTUAL, PRESET, ranks=4, group=2, accumulation=4, capacity=5),
    _row("exact", fsep=EXACT, releases=True),
    _row("nodes-virtual", VIRTUAL, NODES.format(1), ranks=4, group=2, accumulation=4),
    _on(RECOMPUTED, "announced", ANNOUNCED),
    # Homes by a permutation.
    _on(DEPTH_3, "homes", PERMUTED.format(2) + DEEPEP),
    _on(ROUTED_TO_4, "homes-nodes", PERMUTED.format(4) + TOKENS.format(2)),
    _on(RECOMPUTED, "homes-announced", PERMUTED.format(4) + ANNOUNCED),
    # Layouts change after their restore has begun, which goes by the relay in nodes.
    _on(RECOMPUTED, "homes-relay", RANDOM + " --fsep-plan-mode adaptive"
        " --fsep-set imbalance_tolerance=0" + AT_HOME + RELAYED, capacity=6),
    _row("scheduler-off", fsep=SCHEDULER_OFF + " --fsep-set gemm=torch"),
    # Experts in fp8.
    _row("fp8", FP8, IN_FP8, steps=LONG),
    _row("fp8-dist-opt", FP8 + BF16 + DIST_OPT + SHARED, IN_FP8, accumulation=2),
    _row("fp8-nodes", E4M3 + DIST_OPT + PADDING + MOE_RECOMPUTE, IN_FP8 + NODES.format(2) + STEP,
        ranks=4, stock=(4, 2), accumulation=2, without=NO_BIAS),
    _row("fp8-param", BLOCKS + BF16 + DIST_OPT + FULL_RECOMPUTE + FIRST_IN_BF16
        + " --fp8-param-gather", IN_FP8, accumulation=2),
    _row("fp8-flex", BF16 + BLOCKS + PADDING, IN_FP8 + HYBRIDEP, accumulation=4, stock=(1, 2)),
    _row("fp8-mx", MXFP8, IN_FP8, steps=LONG),
    _on(GPT_OSS, "fp8-mx-nodes", IN_FP8 + NODES.format(2) + STEP + MOE_RECOMPUTE,
        exchanges=(4, 2)),
    _on(QWEN3, "fp8-mx-homes", IN_FP8 + FULL_RECOMPUTE + PERMUTED.format(2), exchanges=(6, 2)),
    # Dispatchers.
    _on(LAYER_RECOMPUTED, "deepep-shared", DEEPEP, releases=True),
    _row("hybridep", fsep=HYBRIDEP, capacity=6, releases=True),
    _on(LAYER_RECOMPUTED, "hybridep-padded", HYBRIDEP + " --moe-hybridep-pad-uneven-dispatch-inputs"
        " --moe-permute-fusion-into-hybridep"),
    # Tokens by nodes: two stages with nodes of 2 on 4 ranks, otherwise one.
    _on(ROUTED_TO_4, "tokens-nodes2", TOKENS.format(2), steps=LONG, releases=True),
    _row("tokens-one-node", " --adam-eps 1e-6", TOKENS.format(4), ranks=4, experts=3, stock=(1, 1),
        reference_ranks=1),
    # With one expert-parallel rank, Megatron's local layers cannot train an expert's bias.
    _row("tokens-bias", SQUARED_RELU + " --moe-apply-probs-on-input" + TOP_1 + PER_TOKEN
        + " --eval-interval 4 --eval-iters 2 --check-weight-hash-across-dp-replicas-interval 2",
        TOKENS.format(1) + SCHEDULER_OFF, ranks=4, group=2, stock=(2, 4),
        without=NO_BIAS_NOR_SWIGLU, evaluations=4),
    _row("tokens-virtual", VIRTUAL, TOKENS.format(1) + STEP, ranks=4, group=2, accumulation=4),
    _on(GROUPED, "tokens-router", TOKENS.format(1) + ACT_RECOMPUTE),
    _on(IN_BF16, "step-bf16", STEP + " --fsep-set gemm=torch"),
    _row("e6-on-4", ranks=4, experts=6, stock=(1, 2), reference_ranks=1, steps=LONG),
    # With Adam's default of 1e-8 one gradient in 6144 is so near to zero that rounding moves its
    # weight by 4e-6. Neither stock run happens to show that.
    _row("e3-on-4", " --adam-eps 1e-6", ranks=4, experts=3, stock=(1, 1), reference_ranks=1,
        steps=LONG),
    _row("edp", ranks=4, group=2, steps=LONG),
    _on(TENSOR_PARALLEL, "tensor", releases=True),
    _row("pipeline", PIPELINE, ranks=4, group=2, steps=LONG),
    _row("virtual", VIRTUAL, ranks=4, group=2, accumulation=4, releases=True),
    # No MoE layer in the first stage.
    _row("wire-fp32", PIPELINE + IN_BF16_ON_4.flags, NODES.format(2)
        + " --fsep-set grad_wire_dtype=fp32", ranks=8, group=4, stock=(1, 2), reference_ranks=4,
        reference_flags=IN_BF16_ON_4.flags, accumulation=4),
    # Megatron-FSDP. Where experts have one replica and microbatches are several, its gradients of
    # stock's experts are wrong but for `optim`, so the reference has DDP.
    _fsdp("fsdp-moe", "optim_grads", IN_BF16.flags, reference_flags=IN_BF16.flags,
        fsep=MOE_RECOMPUTE, **IN_BF16.sizes | {"stock": (1, 1)}),
    _fsdp("fsdp-exact", "optim_grads_params", RECOMPUTED.flags, fsep=EXACT + TOKENS.format(2)
        + SCHEDULER_OFF + " --fsep-set restore_algorithm=node", reference_flags=RECOMPUTED.flags,
        **RECOMPUTED.sizes),
    _fsdp("fsdp-step", "optim", FULL_RECOMPUTE + SHARED + PER_TOKEN, fsep=STEP, ranks=4, group=2,
        accumulation=2, stock=(1, 2)),
    _fsdp("fsdp-tensor", "optim_grads_params", TENSOR_PARALLEL.flags,
        reference_flags=TENSOR_PARALLEL.flags, group=2, **TENSOR_PARALLEL.sizes),
    # Losses and routers.
    _row("losses", AUX_LOSSES + BLOCK_RECOMPUTE + MTP + GATED + OVERLAPPED + FP32_ROUTER,
        accumulation=2),
    # Models.
    _on(GROUPED, "dense-first"),
    # At home, passes of a repeated layer with other replicas restore them anew.
    _on(DEPTH_3, "mtp3-exact", EXACT, by_rows_alone=True),
    _row("mtp2-step", OFFLOADED + " --optimizer-offload-fraction 0.5"
        " --overlap-cpu-optimizer-d2h-h2d --grad-reduce-in-bf16" + FULL_RECOMPUTE + REPEATED + "2",
        " --fsep-planner greedy --fsep-plan-mode forecast" + STEP, accumulation=2, without=UNTIED),
    _row("latent-attention", LATENT_ATTENTION + " --rope-type rope" + LATENT_RECOMPUTE
        + " --moe-router-load-balancing-type quantile_balancing"
        " --moe-router-quantile-balancing-ema 0.5 --optimizer lion", HOMES, accumulation=2),
    _row("delta-net",
        " --spec tests.specs.gated_delta_net block_spec --experimental-attention-variant"
        " gated_delta_net --linear-attention-freq 2 --linear-key-head-dim 8"
        " --linear-value-head-dim 12 --linear-num-key-heads 2 --linear-num-value-heads 4"
        " --moe-router-load-balancing-type global_aux_loss"
        " --moe-aux-loss-coeff 1e-3" + SHARED + SELECTIVE + " gdn_norm_out"),
    # A smaller version of Megatron's own command for 256 GPUs.
    _row("deepseek-v3", DIST_OPT + LATENT_ATTENTION + FIRST_LAYER_DENSE + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-4 --moe-router-num-groups 4 --moe-router-group-topk 2"
        " --moe-router-topk-scaling-factor 2.5" + SHARED + " --rotary-scaling-factor 40 --mscale"
        " 1.0 --mscale-all-dim 1.0" + MTP + " --mtp-loss-scaling-factor 0.1" + LATENT_RECOMPUTE
        + " mlp moe layernorm", DEEPEP),
    # As with Kimi-K2's 384, the number of experts is no power of two. Stock's own recompute of
    # their activation needs Transformer Engine.
    _row("kimi-k2", DIST_OPT + LATENT_ATTENTION + FIRST_LAYER_DENSE + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-3 --moe-router-num-groups 1 --moe-router-group-topk 1"
        " --moe-router-topk-scaling-factor 2.827" + SHARED + " --rotary-scaling-factor 32 --mscale"
        " 1.0 --mscale-all-dim 1.0" + LATENT_RECOMPUTE + " mlp layernorm", HYBRIDEP
        + " --moe-grouped-gemm" + LATENT_RECOMPUTE + " mlp layernorm moe_act", experts=6),
    # Feature sets of published commands, in smaller sizes, like the two before. In a pipeline,
    # overlapped reduces would leave parts of the compared gradients.
    _row("mixtral", PIPELINE + " --use-distributed-optimizer" + GROUPED_QUERIES + AUX_LOSS
        + " --moe-aux-loss-coeff 1e-2", ranks=4, group=2, accumulation=2),
    # Stock recomputes nothing here, since that needs Transformer Engine.
    _row("qwen3", TENSOR + DIST_OPT + GROUPED_QUERIES + AUX_LOSS
        + " --qk-layernorm --kv-channels 16 --moe-aux-loss-coeff 1e-3" + TOP_4 + FP32_ROUTER
        + " --moe-ffn-hidden-size 40 --moe-router-fusion --moe-permute-fusion", DEEPEP
        + ACT_RECOMPUTE + " layernorm", ranks=4, stock=(4, 2)),
    _on(GLM, "glm"),
    _row("gpt-oss", BF16 + DIST_OPT + CLAMPED_GEGLU + GROUPED_QUERIES
        + AUX_LOSS + " --softmax-type learnable --window-size 15,0 --window-attn-skip-freq 2"
        " --moe-aux-loss-coeff 1e-3" + TOP_4 + FP32_ROUTER, NODES.format(2) + ACT_RECOMPUTE,
        ranks=4, stock=(4, 2), capacity=4, without=NO_BIAS_NOR_SWIGLU),
    # No Mamba layers, for which Megatron has only GPU kernels.
    _row("nemotron", DIST_OPT + HYBRID + "*E-*E/*E/*E --mtp-use-repeated-layer" + SQUARED_RELU
        + LATENT_MOE + SIGMOID_ROUTER
        + " --moe-aux-loss-coeff 1e-4 --moe-router-topk-scaling-factor 5.0" + SHARED + PER_TOKEN,
        HYBRIDEP, without="--swiglu", capacity=6, exchanges=(6, 4)),
    _on(IN_PIPELINE, "bias-pipeline"),
    _row("hybrid-mtp", FULL_RECOMPUTE + HYBRID
        + "*-E/*E-E/*E-E --mtp-use-repeated-layer --moe-router-load-balancing-type sinkhorn"
        " --optimizer sgd --sgd-momentum 0.9 --lr 5e-2 --min-lr 5e-2", EXACT, exchanges=(10, 5)),
    _row("hybrid-virtual", PIPELINE + " --use-distributed-optimizer" + FULL_RECOMPUTE + AUX_LOSSES
        + SHARED + OVERLAPPED + HYBRID + "*E|E-|*E|-E/*E/*E --mtp-use-repeated-layer", ranks=4,
        group=2, accumulation=2),
    # Parallelism.
    _row("context", CONTEXT + HYBRID_MODEL.flags, ranks=4, stock=(2, 4), reference_ranks=2,
        reference_flags=HYBRID_MODEL.flags, **HYBRID_MODEL.sizes),
    _row("instances", DIST_OPT + " --num-distributed-optimizer-instances 2"
        " --moe-router-force-load-balancing --moe-input-jitter-eps 1e-1", ranks=4, group=2,
        gradients=False),
    # Tied embeddings.
    _row("pipeline-mtp", PIPELINE + MTP, ranks=4, group=2, accumulation=2, without=UNTIED),
    # Weight gradients that are added to main gradients by their product, as Megatron's default is.
    _row("fused", DIST_OPT, TOKENS.format(1), accumulation=2, without=UNFUSED),
    _row("fused-virtual", VIRTUAL + DIST_OPT, ranks=4, group=2, accumulation=4, gradients=False,
        without=UNFUSED),
    # Megatron's combined 1F1B schedule, which runs with bf16 alone.
    _combined("combined", DIST_OPT + SHARED + FP32_ROUTER),
    # Megatron frees the tokens of all layers, also those that the layer in bf16 keeps.
    _combined("combined-fp8-hybridep", BLOCKS + PADDING + FIRST_IN_BF16, IN_FP8 + HYBRIDEP),
    _recipe(DEEPSEEK_V3, "deepseek-v3", group=2, exact=True),
    _recipe(QWEN3, "qwen3"),
    _recipe(GPT_OSS, "gpt-oss"),
    _combined("delayed-virtual", VIRTUAL + MTP + LATENT_MOE + DELAYED, ranks=4, group=2),
    _combined("delayed-exact", DIST_OPT + SHARED + FP32_ROUTER + DELAYED,
        EXACT + DEEPEP + ACT_RECOMPUTE + " layernorm shared_experts", without=UNFUSED),
    _combined("delayed-step", HALF_DENSE + DELAYED, TOKENS.format(2) + STEP, ranks=4, group=4),
    _combined("delayed-graphs", DIST_OPT + SHARED + FP32_ROUTER + DELAYED,
        GRAPHS + " moe_router moe_preprocess"),
    _on(GROUPED, "dispatch-wgrad-off", SCHEDULER_OFF),
    # Frozen weights.
    _row("lora", DIST_OPT + FAST, exchanges=(4, 0), adapt=lora_on_attention),
    # LoRA on experts at home, as Megatron-Bridge adds it.
    _row("lora-announced", BF16 + " --use-distributed-optimizer" + REPLAY + FULL_RECOMPUTE + TENSOR
        + FAST, ANNOUNCED + HOMES, ranks=4, group=2, accumulation=2, without=NO_BIAS,
        adapt=lora_on_experts_under_recompute),
    _on(LORA_OF_EACH_KIND, "lora-all", STEP + NODES.format(2) + HOMES),
    _row("frozen", MOE_RECOMPUTE + DIST_OPT + " --moe-router-force-biased -1", accumulation=2,
        exchanges=(3, 1), adapt=frozen_in_part),
    # Graphs, by the sets of modules that published recipes capture.
    _row("graphs", DIST_OPT + SHARED, SELECTIVE + " layernorm" + GRAPHS
        + " moe_router moe_preprocess", at_night=LONGEST),
    _row("graphs-attention", fsep=HYBRIDEP + GRAPHS + " attn moe_router moe_preprocess", capacity=6,
        at_night=LONGEST),
    _on(GROUPED, "graphs-dense", DEEPEP + GRAPHS + " attn mlp moe_router moe_preprocess",
        at_night=LONGEST),
    _on(HYBRID_MODEL, "graphs-hybrid", GRAPHS + " attn moe_router moe_preprocess",
        at_night=LONGEST),
    _on(IN_PIPELINE, "graphs-tokens", TOKENS.format(2) + SELECTIVE + " layernorm" + GRAPHS
        + " attn moe_router moe_preprocess", at_night=LONGEST),
    _on(LAYER_RECOMPUTED, "graphs-recompute", GRAPHS + " attn", at_night=LONGEST),
    _row("graphs-virtual", VIRTUAL, GRAPHS + " attn moe_router moe_preprocess", ranks=4, group=2,
        accumulation=4, at_night=LONGEST),
    _on(GLM, "graphs-glm", GRAPHS + " attn mlp moe_router moe_preprocess"),
    _on(LORA_OF_EACH_KIND, "graphs-lora", GRAPHS + " attn moe_router moe_preprocess" + HOMES),
    _row("graphs-muon", MUON_SHARED + PIPELINE + " --muon-tp-mode distributed",
        HOMES + GRAPHS + " attn moe_router moe_preprocess", ranks=4, group=2, accumulation=2),
    # Muon needs experts at home.
    _row("muon-bf16", MUON_BF16 + SHARED, HOMES, accumulation=2),
    _row("muon-tensor", MUON + TENSOR + " --muon-tp-mode duplicated --muon-nesterov"
        " --muon-momentum 0.95 --muon-scale-mode unit_rms_norm --muon-extra-scale-factor 0.2"
        " --muon-coefficient-type polar_express --muon-num-ns-steps 8 --muon-no-split-qkv",
        HOMES, ranks=4, stock=(4, 2), without=NO_BIAS),
    _row("evaluate-only", " --skip-train --eval-iters 2", steps=0, evaluations=1, gradients=False),
]
# fmt: on

HOME_ROWS = [row.at_home for row in ROWS if row.runs_at_home]
ALL_ROWS = [*ROWS, *HOME_ROWS]
