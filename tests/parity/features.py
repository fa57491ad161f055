"""What users ask for, and where the answer is: in rows of the parity table, or in refusals.

Names that begin with a flag are settings of `megatron_laer.support.table.REFUSALS`, or words of
`--fsep-allow-unproven`. A feature without names runs, and nothing proves it.
"""

from __future__ import annotations

from megatron_laer.config import Unproven

ALLOW = "--fsep-allow-unproven"

# Where Megatron has no implementation for the CPU, the replacement of `megatron_laer/cpu`,
# by the word of a row's flags that needs it.
REPLACED = {
    "--context-parallel-size": "attention over a sequence that is cut (context parallel)",
    "--hybrid-layer-pattern": "the layers of HybridModel and its last norm (no Mamba layers)",
    "--moe-latent-size": "the projections of latent MoE",
    "--multi-latent-attention": "attention with heads of two sizes (latent attention)",
    "--experimental-attention-variant": "the kernels and modules of gated delta nets",
    "layernorm": "recompute of norms",
    "--sequence-parallel": "norms and biases of experts under sequence parallelism",
    "--moe-permute-fusion": "Transformer Engine's fused permutation",
    "--moe-router-fusion": "Transformer Engine's fused router",
    "--optimizer-cpu-offload": "the two devices of an optimizer that is offloaded in part",
    "--moe-flex-dispatcher-backend": "the flex dispatcher's buffers (these with FSEP alone)",
    "dist_muon": "gathers of tensors of several sizes (Muon's distributed form)",
}

# Rows and words of `--fsep-allow-unproven` of which docs/gpu_status.md has a run.
SEEN_ON_A_CARD: frozenset[str] = frozenset()

FEATURES: dict[str, tuple[str, ...]] = {
    "tensor parallel 2 with sequence parallel": (
        "tensor parallel 2 with sequence parallel",
        "tensor parallel 2, expert data parallel 2, distributed optimizer",
        "tensor parallel 2, MoE in every second layer, aux losses, overlapped shared experts",
    ),
    "pipeline 2": (
        "pipeline 2",
        "pipeline 2 whose first stage has no MoE layer, aux losses, accumulation 2",
        "full recompute, pipeline 2, accumulation 4",
    ),
    "virtual pipeline": (
        "virtual pipeline 2 x 2, accumulation 4",
        "restored once per step, virtual pipeline 2 x 2, accumulation 4",
    ),
    "context parallel 2": ("context parallel 2 with aux losses",),
    "expert data parallel above 1": (
        "expert data parallel 2",
        "expert data parallel 2, distributed optimizer",
    ),
    "`--num-distributed-optimizer-instances` above 1": (
        "distributed optimizer in 2 instances, expert data parallel 2",
    ),
    "distributed optimizer with both overlaps": ("distributed optimizer with both overlaps",),
    "gradient accumulation": (
        "accumulation 4",
        "accumulation 4, distributed optimizer",
    ),
    "bf16": ("bf16", "tied embeddings, bf16, distributed optimizer, full recompute"),
    "`--grad-reduce-in-bf16`": ("main gradients in bf16, accumulation 2",),
    "per-token loss": ("the same losses, recompute of the MoE layer, per-token loss",),
    "full recompute, uniform": ("full recompute",),
    "full recompute, by block": ("the same losses, full recompute of one layer in two",),
    "selective recompute of `moe`": ("selective recompute of the MoE layer",),
    "selective recompute of `core_attn`, `layernorm`, `mlp`, `shared_experts`": (
        "first layer dense, recompute of attention, norms, dense and shared experts",
    ),
    "selective recompute of `moe_act`": (
        "recompute of the experts' activation, with the layer norms",
    ),
    "selective recompute of `mla_up_proj`": ("latent attention, recompute of its up-projections",),
    "selective recompute of `gdn_norm_out`": (
        "gated delta net before attention, recompute of its output norm",
    ),
    "selective recompute of other modules, such as `mhc`": (
        "--recompute-modules other than core_attn, gdn_norm_out, layernorm, mla_up_proj, mlp, moe,"
        " moe_act, shared_experts",
    ),
    "shared experts": ("shared experts", "shared experts with a gate, recompute of the MoE layer"),
    "shared experts with `--moe-shared-expert-overlap`": (
        "shared experts with a gate and overlap",
        "tensor parallel 2, MoE in every second layer, aux losses, overlapped shared experts",
    ),
    "multi-token prediction": (
        "multi-token prediction with aux losses",
        "pipeline 2 with multi-token prediction and tied embeddings, accumulation 2",
    ),
    "multi-token prediction with one layer repeated": (
        "repeated MTP layer, depth 2, aux losses, distributed optimizer, accumulation 2",
        "repeated MTP layer, depth 3, exact, recompute of the MoE layer, shared experts",
        "repeated MTP layer, depth 2, restored once per step, forecast, bf16, accumulation 2",
        "repeated MTP layer, depth 2, adaptive, full recompute, pipeline 2, accumulation 2",
    ),
    "HybridModel": (
        "HybridModel of attention, dense and MoE layers, aux losses, shared experts, distributed"
        " optimizer",
        "HybridModel, two MoE layers repeated by multi-token prediction, full recompute, exact",
        "HybridModel, virtual pipeline 2 x 2, multi-token prediction, accumulation 2",
    ),
    "expert bias": (
        "expert bias",
        "group-limited sigmoid router in fp64 with expert bias, scaling and sequence aux loss",
    ),
    "softmax router": ("plain DDP", "top-1"),
    "sigmoid router": ("expert bias",),
    "square-root softplus router": ("square-root softplus router",),
    "no load balancing": ("plain DDP",),
    "load balancing by aux, sequence and global aux losses, z loss": (
        "aux loss",
        "aux, sequence, global and z losses, accumulation 2",
    ),
    "the losses of load balancing as logged, under recompute": (
        "the same losses, full recompute of one layer in two",
        "the same losses, recompute of the MoE layer, per-token loss",
    ),
    "load balancing by sinkhorn": ("sinkhorn router",),
    "load balancing by quantiles": ("quantile balancing with a moving average, accumulation 2",),
    "forced balance, forced bias, input jitter": (
        "forced balance, input jitter",
        "forced bias that stays, recompute of the MoE layer",
    ),
    "fused router and permutation": (
        "fused router and permutation, aux, sequence, global and z losses",
    ),
    "router replay": (
        "router replay, full recompute, accumulation 2",
        "announced by router replay, full recompute, accumulation 2",
    ),
    "group-limited routing": (
        "group-limited sigmoid router in fp64 with expert bias, scaling and sequence aux loss",
    ),
    "first layers dense": (
        "first layer dense, recompute of attention, norms, dense and shared experts",
    ),
    "`--moe-layer-freq` patterns": (
        "tensor parallel 2, MoE in every second layer, aux losses, overlapped shared experts",
        "pipeline 2 whose first stage has no MoE layer, aux losses, accumulation 2",
    ),
    "LoRA on attention, with all else frozen": (
        "LoRA on attention, distributed optimizer",
        "LoRA on attention, full recompute, restored once per step, accumulation 2, bf16",
    ),
    "models frozen in part": (
        "first layer and first matrix of experts frozen, recompute of the MoE layer,"
        " distributed optimizer, accumulation 2",
    ),
    "untied embeddings": ("plain DDP",),
    "tied embeddings": (
        "tied embeddings, bf16, distributed optimizer, full recompute",
        "pipeline 2 with multi-token prediction and tied embeddings, accumulation 2",
    ),
    "latent MoE": ("latent MoE without a gate, shared experts",),
    "latent attention": (
        "latent attention, recompute of its up-projections",
        "as DeepSeek-V3: latent attention, first layer dense, shared experts, group-limited sigmoid"
        " router with expert bias, multi-token prediction, flex dispatcher with DeepEP, recompute",
        "as Kimi-K2: latent attention, first layer dense, shared experts, sigmoid router with"
        " expert bias, flex dispatcher with HybridEP, recompute with the experts' activation",
    ),
    "gated delta nets": ("gated delta net before attention, recompute of its output norm",),
    "experts without a gate": ("latent MoE without a gate, shared experts",),
    "`--moe-apply-probs-on-input`": ("probabilities applied on input, top-1",),
    "GLU clamp and offset": ("clamped and offset quick-GEGLU",),
    "linear bias": (
        "linear bias, clamped and offset quick-GEGLU",
        "linear bias, distributed optimizer, expert data parallel 2, accumulation 2",
        "linear bias, tensor parallel 2 with sequence parallel, per-token loss",
        "linear bias, recompute of the MoE layer, pipeline 2, accumulation 2",
        "linear bias, recompute of the experts' activation, through nodes of 2, E = 6 on 4 ranks",
        "linear bias, restored once per step, bf16, accumulation 4",
        "linear bias without a gate, probabilities applied on input, top-1, scheduler off",
    ),
    "grouped shared experts": (
        "--use-grouped-gemm-for-shared-expert",
        "--moe-shared-expert-glu-interleave-size",
    ),
    "router padding without fp8": ("router padding, without effect",),
    "GLU interleave": ("--moe-mlp-glu-interleave-size",),
    "Transformer Engine's fused operations": ("--use-transformer-engine-op-fuser",),
    "activation offloading": (
        "--fine-grained-activation-offloading",
        "--cpu-offloading-num-layers",
    ),
    "paged stash": ("--moe-paged-stash",),
    "flex dispatcher with DeepEP": (
        "flex dispatcher with DeepEP",
        "flex dispatcher with DeepEP, bf16, fp32 router, overlapped shared experts",
        "flex dispatcher with DeepEP, recompute of the MoE layer, shared experts, E = 8 on 4 ranks",
    ),
    "flex dispatcher with HybridEP": (
        "flex dispatcher with HybridEP",
        "flex dispatcher with HybridEP, padded inputs, fused permutation, recompute of the MoE"
        " layer, overlapped shared experts, E = 8 on 4 ranks",
    ),
    "flex dispatcher with NCCL EP": ("--moe-flex-dispatcher-backend other than deepep, hybridep",),
    "evaluation": ("evaluation and hashes of weights between steps, expert data parallel 2",),
    "`--skip-train`": ("evaluation alone",),
    "`--check-weight-hash-across-dp-replicas-interval`": (
        "evaluation and hashes of weights between steps, expert data parallel 2",
    ),
    "Adam, SGD, Lion": ("plain DDP", "SGD with momentum", "Lion"),
    "Muon": (
        "Muon",
        "Muon with Nesterov momentum, other scales, coefficients, and tensor-parallel mode",
        "Muon, bf16, accumulation 2, shared experts",
        "Muon, expert data parallel 2, rows that do not divide, E = 3 on 4 ranks",
        "Muon, tensor parallel 2, linear bias",
    ),
    "Muon with `--use-distributed-optimizer`, or `dist_muon`": (
        "dist_muon with both overlaps, expert data parallel 2, bf16",
        "dist_muon, expert data parallel 2, pipeline 2, bf16, accumulation 2",
    ),
    "other optimizers": ("--optimizer other than adam, sgd, lion, muon",),
    "optimizer CPU offload": (
        "optimizer offloaded to the CPU, expert data parallel 2",
        "half of the optimizer offloaded to the CPU with both copies overlapped",
    ),
    "FSEP's planners": (
        "planner greedy, adaptive",
        "planner search, forecast",
        "planner laer, tolerance 0",
    ),
    "FSEP's plan modes": (
        "planner greedy, adaptive",
        "planner search, forecast",
        "fresh layouts after the gate, exact",
        "announced by router replay, full recompute, accumulation 2",
        "announced by router replay, full recompute, pipeline 2, accumulation 4",
    ),
    "FSEP's exchange through nodes": ("exchange through nodes of 2, E = 8 on 4 ranks",),
    "tokens through nodes (`--fsep-token-exchange node`)": (
        "tokens through nodes of 1",
        "tokens through nodes of 2, top-4, E = 8 on 4 ranks",
        "tokens through one node of 4, top-4, E = 6 on 4 ranks",
        "tokens and experts through nodes of 2, exact, bf16, top-4, E = 8 on 4 ranks",
    ),
    "tokens through nodes, with all that tokens by rank have": (
        "tokens through nodes of 2, shared experts, full recompute, distributed optimizer,"
        " accumulation 2, E = 8 on 4 ranks",
        "tokens through nodes of 2, shared experts with a gate and overlap, E = 8 on 4 ranks",
        "tokens through nodes of 2, recompute of the MoE layer and its overlapped shared experts,"
        " multi-token prediction, aux losses, E = 8 on 4 ranks",
        "tokens through nodes of 2, tensor parallel 2 with sequence parallel, fp32 router, bf16",
        "tokens through nodes of 1, latent MoE without a gate, shared experts",
        "tokens through nodes of 2, linear bias without a gate, probabilities applied on input,"
        " top-1, scheduler off",
        "tokens through nodes of 1, virtual pipeline 2 x 2, accumulation 4, restored once per step",
        "tokens through nodes of 1, router in fp64 with groups and expert bias, recompute of the"
        " experts' activation",
    ),
    "`--fsep-restore step`": ("restored once per step, accumulation 4",),
    "`--fsep-scheduler off`": ("scheduler off",),
    "`--fsep-gemm loop`": ("plain DDP",),
    "`--fsep-gemm torch`": (
        "experts' products by grouped_mm",
        "experts' products by grouped_mm, bf16, restored once per step",
    ),
    "`--fsep-gemm streams`": (),
    "`--fsep-gemm te`": (),
    "CUDA graphs of attention, router and dense layers, by Transformer Engine": (
        f"{ALLOW} {Unproven.TE_GRAPHS}",
    ),
    "other CUDA graphs": (
        "--cuda-graph-impl other than none",
        "--cuda-graph-modules other than attn, moe_router, mlp",
    ),
    "fp8 in all layers but the experts": (f"{ALLOW} {Unproven.DENSE_FP8}",),
    "fp8 or fp4 in the experts": (
        "--fp8-param-gather",
        "--moe-router-padding-for-quantization with fp8",
        "--fp4-format",
    ),
}
