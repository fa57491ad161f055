"""Features that users ask for, with the parity rows that answer; refused ones are in the rules.

Rows go by their ids. Other names are words of `--fsep-allow-unproven`. A feature without names
runs, and nothing proves it.
"""

from __future__ import annotations

from megatron_laer.choices import Unproven

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

# In addition to those that `check-recipe` finds in a command.
FEATURES: dict[str, tuple[str, ...]] = {
    "expert data parallel above 1": ("edp",),
    "gradient accumulation": ("accum",),
    "fused gradient accumulation": ("fused", "fused-virtual", "recipe-qwen3"),
    "losses of load balancing as logged, under recompute": ("losses",),
    "models frozen in part": ("frozen",),
    "tied embeddings": ("pipeline-mtp",),
    "router padding without fp8": ("even-split",),
    "router padding with fp8": ("fp8-nodes", "fp8-flex"),
    "evaluation, and hashes of weights": ("tokens-bias",),
    "`--skip-train`": ("evaluate-only",),
    "FSEP's planners": ("greedy", "preset"),
    "adaptive plans": ("greedy",),
    "permuted homes (`--fsep-homes`)": ("homes", "homes-nodes", "homes-announced"),
    "`--fsep-set gemm=torch`": ("scheduler-off", "step-bf16"),
    "`--fsep-set gemm=te`": (),
    "CUDA graphs by Transformer Engine": ("graphs", f"{ALLOW} {Unproven.TE_GRAPHS}"),
    "fp8 in all layers but the experts": (f"{ALLOW} {Unproven.DENSE_FP8}",),
    "fp8 in the experts, by Transformer Engine itself": (f"{ALLOW} {Unproven.FP8_EXPERTS}",),
    "`--first-last-layers-bf16` with experts in fp8": ("fp8-param",),
}
