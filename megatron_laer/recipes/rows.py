"""The rows of the parity table, with the features that each has; `python -m tests.proved_rows`."""

# ruff: noqa: E501

from __future__ import annotations

from typing import NamedTuple


class ProvedRow(NamedTuple):
    """Describes a row of the parity table."""

    name: str
    features: frozenset[str]
    is_replaced: bool


def _row(name: str, features: str = "", is_replaced: bool = False) -> ProvedRow:
    return ProvedRow(name, frozenset(features.split(", ") if features else ()), is_replaced)


ROWS = (
    _row("plain DDP"),
    _row("distributed optimizer with both overlaps", "distributed optimizer"),
    _row("accumulation 4"),
    _row("accumulation 4, distributed optimizer", "distributed optimizer"),
    _row("shared experts", "shared experts"),
    _row("aux loss", "aux loss"),
    _row("expert bias", "expert bias, sigmoid router"),
    _row("full recompute", "full recompute"),
    _row("selective recompute of the MoE layer", "recompute of moe"),
    _row(
        "recompute of the experts' activation, with the layer norms",
        "recompute of layernorm, recompute of moe_act",
        True,
    ),
    _row("bf16", "bf16"),
    _row("main gradients in bf16, accumulation 2", "bf16, gradients in bf16"),
    _row("few tokens: experts, ranks and microbatches without any"),
    _row("top-1"),
    _row("even split"),
    _row("planner greedy, adaptive"),
    _row("planner search, forecast", "forecast plans"),
    _row("planner laer, tolerance 0"),
    _row("fresh layouts after the gate, exact", "exact plans"),
    _row("exact on nodes of 2, E = 8 on 4 ranks", "exact plans, experts through nodes"),
    _row("exchange through nodes of 2, E = 8 on 4 ranks", "experts through nodes"),
    _row(
        "exchange through nodes of 2, full recompute, distributed optimizer, E = 8 on 4 ranks",
        "distributed optimizer, experts through nodes, full recompute",
    ),
    _row(
        "exchange through nodes of 1, virtual pipeline 2 x 2, accumulation 4",
        "experts through nodes, pipeline, virtual pipeline",
    ),
    _row(
        "restored once per step through nodes of 2, accumulation 2, bf16, E = 8 on 4 ranks",
        "bf16, experts restored once per step, experts through nodes",
    ),
    _row(
        "announced by router replay, full recompute, accumulation 2",
        "announced plans, full recompute, router replay",
    ),
    _row(
        "announced by router replay, full recompute, pipeline 2, accumulation 4",
        "announced plans, full recompute, pipeline, router replay",
    ),
    _row("scheduler off", "scheduler off"),
    _row("experts' products by grouped_mm"),
    _row(
        "experts' products by grouped_mm, bf16, restored once per step",
        "bf16, experts restored once per step",
    ),
    _row("flex dispatcher with DeepEP", "DeepEP", True),
    _row(
        "flex dispatcher with DeepEP, bf16, fp32 router, overlapped shared experts",
        "DeepEP, bf16, overlapped shared experts, router in fp32, shared experts",
        True,
    ),
    _row(
        "flex dispatcher with DeepEP, recompute of the MoE layer, shared experts, E = 8 on 4 ranks",
        "DeepEP, recompute of moe, shared experts",
        True,
    ),
    _row("flex dispatcher with HybridEP", "HybridEP", True),
    _row(
        "flex dispatcher with HybridEP, padded inputs, fused permutation, recompute of the MoE layer, overlapped shared experts, E = 8 on 4 ranks",
        "HybridEP, overlapped shared experts, recompute of moe, shared experts",
        True,
    ),
    _row("tokens through nodes of 1", "tokens through nodes"),
    _row("tokens through nodes of 2, top-4, E = 8 on 4 ranks", "tokens through nodes"),
    _row("tokens through one node of 4, top-4, E = 6 on 4 ranks", "tokens through nodes"),
    _row(
        "tokens and experts through nodes of 2, exact, bf16, top-4, E = 8 on 4 ranks",
        "bf16, exact plans, experts through nodes, tokens through nodes",
    ),
    _row(
        "tokens through nodes of 2, few tokens: experts, ranks and microbatches without any",
        "tokens through nodes",
    ),
    _row(
        "tokens through nodes of 2, shared experts, full recompute, distributed optimizer, accumulation 2, E = 8 on 4 ranks",
        "distributed optimizer, full recompute, shared experts, tokens through nodes",
    ),
    _row(
        "tokens through nodes of 2, shared experts with a gate and overlap, E = 8 on 4 ranks",
        "gated shared experts, overlapped shared experts, shared experts, tokens through nodes",
    ),
    _row(
        "tokens through nodes of 2, recompute of the MoE layer and its overlapped shared experts, multi-token prediction, aux losses, E = 8 on 4 ranks",
        "aux loss, global aux loss, multi-token prediction, overlapped shared experts, recompute of moe, sequence aux loss, shared experts, tokens through nodes, z loss",
    ),
    _row(
        "tokens through nodes of 2, tensor parallel 2 with sequence parallel, fp32 router, bf16",
        "bf16, router in fp32, tensor parallel, tokens through nodes",
        True,
    ),
    _row(
        "tokens through nodes of 1, latent MoE without a gate, shared experts",
        "experts without a gate, latent MoE, shared experts, tokens through nodes",
        True,
    ),
    _row(
        "tokens through nodes of 2, linear bias without a gate, probabilities applied on input, top-1, scheduler off",
        "experts without a gate, linear bias, probabilities on input, scheduler off, tokens through nodes",
    ),
    _row(
        "tokens through nodes of 1, virtual pipeline 2 x 2, accumulation 4, restored once per step",
        "experts restored once per step, pipeline, tokens through nodes, virtual pipeline",
    ),
    _row(
        "tokens through nodes of 1, router in fp64 with groups and expert bias, recompute of the experts' activation",
        "expert bias, group-limited router, recompute of moe_act, router in fp64, sigmoid router, tokens through nodes",
    ),
    _row("restored once per step, accumulation 4", "experts restored once per step"),
    _row(
        "restored once per step, accumulation 4, distributed optimizer",
        "distributed optimizer, experts restored once per step",
    ),
    _row("restored once per step, bf16, accumulation 4", "bf16, experts restored once per step"),
    _row("even split, E = 8 on 4 ranks"),
    _row("most slots"),
    _row("fewest slots"),
    _row("E = 8 on 4 ranks"),
    _row("E = 8 on 4 ranks, distributed optimizer", "distributed optimizer"),
    _row("E = 6 on 4 ranks"),
    _row("E = 3 on 4 ranks"),
    _row("expert data parallel 2"),
    _row("expert data parallel 2, distributed optimizer", "distributed optimizer"),
    _row("tensor parallel 2 with sequence parallel", "tensor parallel", True),
    _row(
        "tensor parallel 2, expert data parallel 2, distributed optimizer",
        "distributed optimizer, tensor parallel",
        True,
    ),
    _row("pipeline 2", "pipeline"),
    _row("virtual pipeline 2 x 2, accumulation 4", "pipeline, virtual pipeline"),
    _row(
        "restored once per step through nodes of 1, pipeline 2, accumulation 4",
        "experts restored once per step, experts through nodes, pipeline",
    ),
    _row(
        "exchange through nodes of 2, fp32 on the wire, pipeline 2, accumulation 4, bf16, E = 8 on 8 ranks",
        "bf16, experts through nodes, pipeline",
    ),
    _row(
        "restored once per step, virtual pipeline 2 x 2, accumulation 4",
        "experts restored once per step, pipeline, virtual pipeline",
    ),
    _row("full recompute, pipeline 2, accumulation 4", "full recompute, pipeline"),
    _row(
        "aux, sequence, global and z losses, accumulation 2",
        "aux loss, global aux loss, sequence aux loss, z loss",
    ),
    _row(
        "the same losses, full recompute of one layer in two",
        "aux loss, full recompute, global aux loss, sequence aux loss, z loss",
    ),
    _row(
        "the same losses, recompute of the MoE layer, per-token loss",
        "aux loss, global aux loss, per-token loss, recompute of moe, sequence aux loss, z loss",
    ),
    _row("sinkhorn router", "sinkhorn router"),
    _row("quantile balancing with a moving average, accumulation 2", "quantile balancing"),
    _row(
        "group-limited sigmoid router in fp64 with expert bias, scaling and sequence aux loss",
        "expert bias, group-limited router, router in fp64, sequence aux loss, sigmoid router",
    ),
    _row("forced balance, input jitter", "forced balance, input jitter"),
    _row("forced bias that stays, recompute of the MoE layer", "forced bias, recompute of moe"),
    _row(
        "fused router and permutation, aux, sequence, global and z losses",
        "aux loss, fused permutation, fused router, global aux loss, sequence aux loss, z loss",
        True,
    ),
    _row("router replay, full recompute, accumulation 2", "full recompute, router replay"),
    _row("square-root softplus router", "square-root softplus router"),
    _row(
        "shared experts with a gate and overlap",
        "gated shared experts, overlapped shared experts, shared experts",
    ),
    _row(
        "shared experts with a gate, recompute of the MoE layer",
        "gated shared experts, recompute of moe, shared experts",
    ),
    _row(
        "first layer dense, recompute of attention, norms, dense and shared experts",
        "dense layers, recompute of core_attn, recompute of layernorm, recompute of mlp, recompute of shared_experts, shared experts",
        True,
    ),
    _row(
        "multi-token prediction with aux losses",
        "aux loss, global aux loss, multi-token prediction, sequence aux loss, z loss",
    ),
    _row(
        "repeated MTP layer, depth 2, aux losses, distributed optimizer, accumulation 2",
        "aux loss, distributed optimizer, global aux loss, multi-token prediction, repeated multi-token prediction, sequence aux loss, z loss",
    ),
    _row(
        "repeated MTP layer, depth 3, exact, recompute of the MoE layer, shared experts",
        "exact plans, multi-token prediction, recompute of moe, repeated multi-token prediction, shared experts",
    ),
    _row(
        "repeated MTP layer, depth 2, restored once per step, forecast, bf16, accumulation 2",
        "bf16, experts restored once per step, forecast plans, multi-token prediction, repeated multi-token prediction",
    ),
    _row(
        "repeated MTP layer, depth 2, adaptive, full recompute, pipeline 2, accumulation 2",
        "full recompute, multi-token prediction, pipeline, repeated multi-token prediction",
    ),
    _row(
        "latent attention, recompute of its up-projections",
        "latent attention, recompute of mla_up_proj",
        True,
    ),
    _row(
        "gated delta net before attention, recompute of its output norm",
        "gated delta nets, recompute of gdn_norm_out",
        True,
    ),
    _row(
        "as DeepSeek-V3: latent attention, first layer dense, shared experts, group-limited sigmoid router with expert bias, multi-token prediction, flex dispatcher with DeepEP, recompute",
        "DeepEP, dense layers, distributed optimizer, expert bias, group-limited router, latent attention, multi-token prediction, recompute of layernorm, recompute of mla_up_proj, recompute of mlp, recompute of moe, router in fp32, sequence aux loss, shared experts, sigmoid router",
        True,
    ),
    _row(
        "as Kimi-K2: latent attention, first layer dense, shared experts, sigmoid router with expert bias, flex dispatcher with HybridEP, recompute with the experts' activation",
        "HybridEP, dense layers, distributed optimizer, expert bias, latent attention, recompute of layernorm, recompute of mla_up_proj, recompute of mlp, recompute of moe_act, router in fp32, sequence aux loss, shared experts, sigmoid router",
        True,
    ),
    _row(
        "as Mixtral: grouped queries, aux loss, pipeline 2, distributed optimizer, accumulation 2",
        "aux loss, distributed optimizer, pipeline",
    ),
    _row(
        "as Qwen3: grouped and normalised queries, top-4, aux loss, fp32 router, tensor parallel 2, flex dispatcher with DeepEP, recompute of norms and of the experts' activation",
        "DeepEP, aux loss, distributed optimizer, recompute of layernorm, recompute of moe_act, router in fp32, tensor parallel",
        True,
    ),
    _row(
        "as GLM-4.5: first layer dense, overlapped shared experts, sigmoid router with expert bias, biased and normalised queries, multi-token prediction, recompute of attention",
        "dense layers, distributed optimizer, expert bias, multi-token prediction, overlapped shared experts, recompute of core_attn, router in fp32, sequence aux loss, shared experts, sigmoid router",
    ),
    _row(
        "as gpt-oss: linear bias, clamped and offset quick-GEGLU, learned softmax, windows, top-4, aux loss, fp32 router",
        "aux loss, clamped gates, distributed optimizer, linear bias, router in fp32",
    ),
    _row(
        "as Nemotron-3: HybridModel, latent MoE without a gate, shared experts, sigmoid router with expert bias, repeated multi-token prediction, flex dispatcher with HybridEP",
        "HybridEP, HybridModel, distributed optimizer, expert bias, experts without a gate, latent MoE, multi-token prediction, per-token loss, repeated multi-token prediction, router in fp32, sequence aux loss, shared experts, sigmoid router",
        True,
    ),
    _row("clamped and offset quick-GEGLU", "clamped gates"),
    _row("linear bias, clamped and offset quick-GEGLU", "clamped gates, linear bias"),
    _row(
        "linear bias, distributed optimizer, expert data parallel 2, accumulation 2",
        "distributed optimizer, linear bias",
    ),
    _row(
        "linear bias, tensor parallel 2 with sequence parallel, per-token loss",
        "linear bias, per-token loss, tensor parallel",
        True,
    ),
    _row(
        "linear bias, recompute of the MoE layer, pipeline 2, accumulation 2",
        "linear bias, pipeline, recompute of moe",
    ),
    _row(
        "linear bias, recompute of the experts' activation, through nodes of 2, E = 6 on 4 ranks",
        "clamped gates, experts through nodes, linear bias, recompute of moe_act",
    ),
    _row(
        "linear bias, restored once per step, bf16, accumulation 4",
        "bf16, clamped gates, experts restored once per step, linear bias",
    ),
    _row(
        "linear bias without a gate, probabilities applied on input, top-1, scheduler off",
        "experts without a gate, linear bias, probabilities on input, scheduler off",
    ),
    _row("probabilities applied on input, top-1", "probabilities on input"),
    _row(
        "latent MoE without a gate, shared experts",
        "experts without a gate, latent MoE, shared experts",
        True,
    ),
    _row(
        "tied embeddings, bf16, distributed optimizer, full recompute",
        "bf16, distributed optimizer, full recompute",
    ),
    _row(
        "HybridModel of attention, dense and MoE layers, aux losses, shared experts, distributed optimizer",
        "HybridModel, aux loss, distributed optimizer, global aux loss, sequence aux loss, shared experts, z loss",
        True,
    ),
    _row(
        "HybridModel, two MoE layers repeated by multi-token prediction, full recompute, exact",
        "HybridModel, exact plans, full recompute, multi-token prediction, repeated multi-token prediction",
        True,
    ),
    _row(
        "HybridModel, virtual pipeline 2 x 2, multi-token prediction, accumulation 2",
        "HybridModel, multi-token prediction, pipeline, virtual pipeline",
        True,
    ),
    _row(
        "context parallel 2 with aux losses",
        "aux loss, context parallel, global aux loss, sequence aux loss, z loss",
        True,
    ),
    _row(
        "distributed optimizer in 2 instances, expert data parallel 2",
        "distributed optimizer, instances of the distributed optimizer",
    ),
    _row(
        "tensor parallel 2, MoE in every second layer, aux losses, overlapped shared experts",
        "aux loss, dense layers, global aux loss, overlapped shared experts, sequence aux loss, shared experts, tensor parallel, z loss",
        True,
    ),
    _row(
        "pipeline 2 whose first stage has no MoE layer, aux losses, accumulation 2",
        "aux loss, dense layers, global aux loss, pipeline, sequence aux loss, z loss",
    ),
    _row(
        "pipeline 2 with multi-token prediction and tied embeddings, accumulation 2",
        "multi-token prediction, pipeline",
    ),
    _row("LoRA on attention, distributed optimizer", "LoRA, distributed optimizer"),
    _row(
        "LoRA on attention, full recompute, restored once per step, accumulation 2, bf16",
        "LoRA, bf16, experts restored once per step, full recompute",
    ),
    _row(
        "first layer and first matrix of experts frozen, recompute of the MoE layer, distributed optimizer, accumulation 2",
        "distributed optimizer, recompute of moe",
    ),
    _row("router padding, without effect"),
    _row(
        "optimizer offloaded to the CPU, expert data parallel 2",
        "bf16, distributed optimizer, offloaded optimizer",
        True,
    ),
    _row(
        "half of the optimizer offloaded to the CPU with both copies overlapped",
        "bf16, distributed optimizer, offloaded optimizer",
        True,
    ),
    _row("SGD with momentum", "SGD"),
    _row("Lion", "Lion"),
    _row("Muon", "Muon"),
    _row(
        "Muon with Nesterov momentum, other scales, coefficients, and tensor-parallel mode", "Muon"
    ),
    _row("Muon, bf16, accumulation 2, shared experts", "Muon, bf16, shared experts"),
    _row(
        "Muon, expert data parallel 2, rows that do not divide, E = 3 on 4 ranks",
        "Muon, experts without a gate",
    ),
    _row("Muon, tensor parallel 2, linear bias", "Muon, linear bias, tensor parallel", True),
    _row("dist_muon with both overlaps, expert data parallel 2, bf16", "bf16, shared Muon", True),
    _row(
        "dist_muon, expert data parallel 2, pipeline 2, bf16, accumulation 2",
        "bf16, pipeline, shared Muon",
        True,
    ),
    _row("evaluation and hashes of weights between steps, expert data parallel 2"),
    _row("evaluation alone"),
)
