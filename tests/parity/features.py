"""Features that users ask for, with the parity rows or refusals that answer.

Rows go by their ids. Names that begin with a flag are settings of
`megatron_laer.rules.REFUSALS`, or words of `--fsep-allow-unproven`. A feature without names
runs, and nothing proves it.
"""

from __future__ import annotations

from megatron_laer.config import Unproven

ALLOW = "--fsep-allow-unproven"

# Replacements for parts that Megatron lacks on the CPU, by the word of a row's flags that needs
# them.
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
    "--fp8-format": "Transformer Engine's fp8 in experts, by the definitions of its quantisers",
    "--moe-flex-dispatcher-backend": "the flex dispatcher's buffers (these with FSEP alone)",
    "--delay-wgrad-compute": "delayed weight gradients of Transformer Engine's layers",
    "--overlap-dispatch-backward-with-experts-wgrad": "those of Transformer Engine's experts",
    "--cuda-graph-impl": "Transformer Engine's CUDA graphs, by calls of the captured parts",
    "--use-megatron-fsdp": "meshes of CUDA devices and NCCL's scaled sums, both named in"
    " Megatron-FSDP",
    "dist_muon": "gathers of tensors of several sizes (Muon's distributed form)",
}

# Ids of rows and words of `--fsep-allow-unproven` with a run in docs/gpu_status.md.
SEEN_ON_A_CARD: frozenset[str] = frozenset()

FEATURES: dict[str, tuple[str, ...]] = {
    "tensor parallel 2 with sequence parallel": ("tensor", "tensor-edp"),
    "pipeline 2": ("pipeline", "pipeline-dense", "recompute-pipeline"),
    "virtual pipeline": ("virtual", "step-virtual"),
    "context parallel 2": ("context",),
    "expert data parallel above 1": ("edp", "edp-dist-opt"),
    "`--num-distributed-optimizer-instances` above 1": ("instances",),
    "distributed optimizer with both overlaps": ("dist-opt",),
    "dense layers sharded by `--use-megatron-fsdp`": ("fsdp", "fsdp-optim", "fsdp-moe", "fsdp-edp"),
    "gradient accumulation": ("accum", "accum-dist-opt"),
    "bf16": ("bf16", "tied"),
    "`--grad-reduce-in-bf16`": ("bf16-grads",),
    "per-token loss": ("losses-moe-recompute",),
    "full recompute, uniform": ("full-recompute",),
    "full recompute, by block": ("losses",),
    "selective recompute of `moe`": ("moe-recompute",),
    "selective recompute of `core_attn`, `layernorm`, `mlp`, `shared_experts`": ("dense-first",),
    "selective recompute of `moe_act`": ("act-recompute",),
    "selective recompute of `mla_up_proj`": ("latent-attention",),
    "selective recompute of `gdn_norm_out`": ("delta-net",),
    "selective recompute of other modules, such as `mhc`": (
        "--recompute-modules other than core_attn, gdn_norm_out, layernorm, mla_up_proj, mlp, moe,"
        " moe_act, shared_experts with --recompute-granularity selective",
    ),
    "shared experts": ("shared", "gated-recompute"),
    "shared experts with `--moe-shared-expert-overlap`": ("losses", "tensor"),
    "multi-token prediction": ("losses", "pipeline-mtp"),
    "multi-token prediction with one layer repeated": (
        "mtp3",
        "mtp3-exact",
        "mtp2-step",
        "mtp2-pipeline",
    ),
    "HybridModel": ("hybrid", "hybrid-mtp", "hybrid-virtual"),
    "expert bias": ("bias-router", "dense-first"),
    "softmax router": ("plain", "top1"),
    "sigmoid router": ("bias-router",),
    "square-root softplus router": ("tokens-shared",),
    "permuted homes (`--fsep-homes`)": (
        "homes",
        "homes-nodes",
        "homes-announced",
        "dist-muon-pipeline",
    ),
    "no load balancing": ("plain",),
    "load balancing by aux, sequence and global aux losses, z loss": ("aux", "losses"),
    "the losses of load balancing as logged, under recompute": (
        "losses",
        "losses-moe-recompute",
    ),
    "load balancing by sinkhorn": ("hybrid-mtp",),
    "load balancing by quantiles": ("latent-attention",),
    "forced balance, forced bias, input jitter": ("instances", "frozen"),
    "fused router and permutation": ("tensor", "qwen3"),
    "router replay": ("replay", "announced"),
    "group-limited routing": ("dense-first",),
    "first layers dense": ("dense-first",),
    "`--moe-layer-freq` patterns": ("tensor", "pipeline-dense"),
    "LoRA on attention, with all else frozen": ("lora", "lora-step"),
    "LoRA on experts, at home": (
        "lora-experts",
        "lora-announced",
        "lora-kinds",
        "lora-canonical",
        "lora-all",
    ),
    "models frozen in part": ("frozen",),
    "untied embeddings": ("plain",),
    "tied embeddings": ("tied", "pipeline-mtp"),
    "latent MoE": ("hybrid", "combined-virtual"),
    "latent attention": ("latent-attention", "deepseek-v3", "kimi-k2"),
    "gated delta nets": ("delta-net",),
    "experts without a gate": ("hybrid", "evaluation"),
    "`--moe-apply-probs-on-input`": ("probs-on-input",),
    "GLU clamp and offset": ("clamp",),
    "linear bias": (
        "bias-clamp",
        "bias-dist-opt",
        "bias-tensor",
        "bias-pipeline",
        "bias-act-recompute",
        "bias-step",
        "evaluation",
    ),
    "grouped shared experts": (
        "--use-grouped-gemm-for-shared-expert",
        "--moe-shared-expert-glu-interleave-size",
    ),
    "router padding without fp8": ("even-split",),
    "GLU interleave": ("--moe-mlp-glu-interleave-size",),
    "Transformer Engine's fused operations": ("--use-transformer-engine-op-fuser",),
    "activation offloading": (
        "--fine-grained-activation-offloading",
        "--cpu-offloading-num-layers",
    ),
    "paged stash": ("--moe-paged-stash",),
    "flex dispatcher with DeepEP": ("deepep", "deepep-bf16", "deepep-shared"),
    "flex dispatcher with HybridEP": ("hybridep", "hybridep-padded"),
    "flex dispatcher with NCCL EP": ("--moe-flex-dispatcher-backend other than deepep, hybridep",),
    "combined 1F1B (`--overlap-moe-expert-parallel-comm`)": (
        "combined",
        "combined-virtual",
    ),
    "combined 1F1B with `--delay-wgrad-compute`": (
        "delayed",
        "delayed-virtual",
        "delayed-exact",
        "delayed-step",
        "recipe-qwen3",
    ),
    "`--overlap-dispatch-backward-with-experts-wgrad`": ("dense-first", "dispatch-wgrad-off"),
    "combined 1F1B with graphs of router and counts": ("delayed-graphs",),
    "evaluation": ("evaluation",),
    "`--skip-train`": ("evaluate-only",),
    "`--check-weight-hash-across-dp-replicas-interval`": ("evaluation",),
    "Adam, SGD, Lion": ("plain", "hybrid-mtp", "latent-attention"),
    "Muon": ("muon", "muon-bf16", "muon-tensor"),
    "Muon with `--use-distributed-optimizer`, or `dist_muon`": ("dist-muon", "dist-muon-pipeline"),
    "other optimizers": ("--optimizer other than adam, sgd, lion, muon",),
    "optimizer CPU offload": ("offload", "tied"),
    "FSEP's planners": ("greedy", "preset"),
    "FSEP's plan modes": ("greedy", "forecast", "exact", "announced", "announced-pipeline"),
    "FSEP's exchange through nodes": ("nodes",),
    "tokens through nodes (`--fsep-token-exchange node`)": (
        "tokens-nodes1",
        "tokens-nodes2",
        "tokens-one-node",
        "tokens-exact",
    ),
    "tokens through nodes, with all that tokens by rank have": (
        "tokens-shared",
        "tokens-mtp",
        "tokens-tensor",
        "tokens-latent",
        "tokens-bias",
        "tokens-virtual",
        "tokens-router",
    ),
    "`--fsep-restore step`": ("step",),
    "`--fsep-set scheduler=off`": ("scheduler-off",),
    "`--fsep-set gemm=loop`": ("plain",),
    "`--fsep-set gemm=torch`": ("scheduler-off", "step-bf16"),
    "`--fsep-set gemm=te`": (),
    "CUDA graphs of parts of layers, up to the counts, by Transformer Engine": (
        *("graphs", "graphs-attention", "graphs-dense", "graphs-hybrid", "graphs-tokens"),
        *("graphs-recompute", "graphs-virtual", "graphs-glm", "graphs-lora", "graphs-muon"),
        f"{ALLOW} {Unproven.TE_GRAPHS}",
    ),
    "other CUDA graphs": (
        "--cuda-graph-impl other than none",
        "--cuda-graph-modules other than attn, mamba, mlp, moe_preprocess, moe_router",
        "--cuda-graph-modules attn with --overlap-moe-expert-parallel-comm",
    ),
    "fp8 in all layers but the experts": (f"{ALLOW} {Unproven.DENSE_FP8}",),
    "fp8 in the experts, at home, per-tensor current scaling": (
        *("fp8", "fp8-dist-opt", "fp8-nodes", "fp8-bias"),
    ),
    "fp8 in the experts, at home, by blocks": ("fp8-blocks", "fp8-flex", "combined-fp8"),
    "mxfp8 in the experts, at home": ("fp8-mx", "fp8-mx-recompute", "fp8-mx-nodes"),
    "the same with `--fp8-param-gather`": ("fp8-param", "fp8-mx-param", "fp8-mx-homes"),
    "the same with `--first-last-layers-bf16`": ("fp8-param",),
    "the same with router padding": ("fp8-bias", "fp8-flex"),
    "the same with combined 1F1B and HybridEP": (
        *("combined-fp8-hybridep", "recipe-deepseek-v3", "recipe-qwen3", "recipe-gpt-oss"),
    ),
    "fp8 in the experts, by Transformer Engine itself": (f"{ALLOW} {Unproven.FP8_EXPERTS}",),
    "fp4, or precision by module": ("--fp4-format", "--te-precision-config-file"),
}
