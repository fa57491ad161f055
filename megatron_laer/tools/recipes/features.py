"""Features of a run by its settings: a parity row must have them to prove the run.

They concern the parts that FSEP changes: MoE layers, their parameters and their place in a model.
Other features are listed if no row has them, or if the rows that have them run on a replacement.
Settings without an attribute count as off.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_laer.precision import recipe_of
from megatron_laer.rules import graphed

_SWITCHES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "use_distributed_optimizer": "distributed optimizer",
    "use_megatron_fsdp": "Megatron-FSDP",
    "grad_reduce_in_bf16": "gradients in bf16",
    "optimizer_cpu_offload": "offloaded optimizer",
    "calculate_per_token_loss": "per-token loss",
    "pipeline_model_parallel_layout": "pipeline layout",
    "moe_shared_expert_intermediate_size": "shared experts",
    "moe_shared_expert_overlap": "overlapped shared experts",
    "moe_shared_expert_gate": "gated shared experts",
    "mtp_use_repeated_layer": "repeated multi-token prediction",
    "multi_latent_attention": "latent attention",
    "moe_latent_size": "latent MoE",
    "activation_func_clamp_value": "clamped gates",
    "add_bias_linear": "linear bias",
    "moe_apply_probs_on_input": "probabilities on input",
    "moe_router_enable_expert_bias": "expert bias",
    "moe_router_force_load_balancing": "forced balance",
    "moe_router_force_biased": "forced bias",
    "moe_input_jitter_eps": "input jitter",
    "moe_router_fusion": "fused router",
    "moe_permute_fusion": "fused permutation",
    "moe_enable_routing_replay": "router replay",
    "moe_z_loss_coeff": "z loss",
    "num_layers_per_virtual_pipeline_stage": "virtual pipeline",
    "overlap_moe_expert_parallel_comm": "combined 1F1B",
    "delay_wgrad_compute": "delayed weight gradients",
    "overlap_dispatch_backward_with_experts_wgrad": "weight gradients behind the dispatch",
    "is_lora": "LoRA",
    "adapts_experts": "LoRA on experts",
}
_SIZES = {
    "tensor_model_parallel_size": "tensor parallel",
    "pipeline_model_parallel_size": "pipeline",
    "virtual_pipeline_model_parallel_size": "virtual pipeline",
    "num_virtual_stages_per_pipeline_rank": "virtual pipeline",
    "context_parallel_size": "context parallel",
    "num_distributed_optimizer_instances": "instances of the distributed optimizer",
    "moe_router_num_groups": "group-limited router",
}
_VALUES = {
    "moe_router_score_function": {
        "sigmoid": "sigmoid router",
        "sqrtsoftplus": "square-root softplus router",
    },
    "moe_router_dtype": {"fp32": "router in fp32", "fp64": "router in fp64"},
    "fsep_plan_mode": {
        "forecast": "forecast plans",
        "exact": "exact plans",
        "announced": "announced plans",
    },
    "fsep_token_exchange": {"node": "tokens through nodes"},
    "fsep_restore_algorithm": {"node": "experts through nodes"},
    "fsep_restore": {"step": "experts restored once per step"},
    "fsep_scheduler": {"off": "scheduler off"},
}
_LOSSES = {
    "aux_loss": "aux loss",
    "seq_aux_loss": "sequence aux loss",
    "global_aux_loss": "global aux loss",
}
_BALANCING = {"sinkhorn": "sinkhorn router", "quantile_balancing": "quantile balancing"}
_VARIANTS = {"gated_delta_net": "gated delta nets", "dsa": "sparse attention"}
_ZERO = re.compile(r"(?<![\d.])0(?![\d.])")


def features_of(settings: Namespace) -> frozenset[str]:
    """Return the features of parsed arguments, or of another object with these attributes."""
    found = frozenset(_features(settings))
    # Muon that is shared among replicas has its own kind of distributed optimizer.
    return found - {"distributed optimizer"} if "shared Muon" in found else found


def _features(settings: Namespace) -> Iterator[str]:
    def get(name: str) -> Any:
        return getattr(settings, name, None)

    yield from (feature for name, feature in _SWITCHES.items() if get(name))
    yield from (feature for name, feature in _SIZES.items() if int(get(name) or 1) > 1)
    for name, words in _VALUES.items():
        value = str(get(name))
        yield from (feature for word, feature in words.items() if word == value)
    if get("fp8") or get("fp8_format"):  # the argument of the flag, or the flag of a row
        yield f"fp8 {recipe_of(settings)}"
        if get("fp8_param_gather") or get("fp8_param"):
            yield "parameters in fp8"
    yield from _recomputed(get("recompute_granularity"), get("recompute_modules"))
    yield from (f"graphs of {name}" for name in graphed(settings) or ())
    yield from _balanced(get("moe_router_load_balancing_type"), get("moe_aux_loss_coeff"))
    if get("moe_token_dispatcher_type") == "flex":
        is_hybrid = get("moe_flex_dispatcher_backend") == "hybridep"
        yield "HybridEP" if is_hybrid else "DeepEP"
    if variant := get("experimental_attention_variant"):
        yield _VARIANTS.get(variant, "experimental attention")
    # The second name is Megatron's old one.
    pattern = str(get("hybrid_layer_pattern") or get("hybrid_override_pattern") or "")
    if pattern:
        yield "HybridModel"
    if pattern.split("/")[0].count("|") >= int(get("pipeline_model_parallel_size") or 1):
        yield "virtual pipeline"
    if "M" in pattern:
        yield "Mamba layers"
    if get("mtp_num_layers") or "/" in pattern:
        yield "multi-token prediction"
    if _has_dense_layers(get("moe_layer_freq")):
        yield "dense layers"
    if _is_without_gate(settings):
        yield "experts without a gate"
    yield from _optimizer(get("optimizer"), bool(get("use_distributed_optimizer")))


def _recomputed(granularity: Any, modules: Any) -> Iterator[str]:
    if granularity == "full":
        yield "full recompute"
    if granularity == "selective":  # by default of attention's core
        yield from (f"recompute of {name}" for name in _listed(modules) or ["core_attn"])


def _balanced(given: Any, coefficients: Any) -> Iterator[str]:
    weights = coefficients if isinstance(coefficients, list) else [coefficients]
    for number, name in enumerate(_listed(given)):
        if name in _BALANCING:
            yield _BALANCING[name]
        if name in _LOSSES and float(weights[min(number, len(weights) - 1)] or 0):
            yield _LOSSES[name]


def _has_dense_layers(frequency: Any) -> bool:
    text = str(frequency or 1)
    return int(text) > 1 if text.isdecimal() else bool(_ZERO.search(text))


def _is_without_gate(settings: Namespace) -> bool:
    if hasattr(settings, "gated_linear_unit"):
        return not settings.gated_linear_unit
    gates = [name for name in ("swiglu", "quick_geglu") if hasattr(settings, name)]
    return bool(gates) and not any(getattr(settings, name) for name in gates)


def _optimizer(name: Any, is_shared: bool) -> Iterator[str]:
    if name == "dist_muon" or (name == "muon" and is_shared):
        yield "shared Muon"
    elif name in ("sgd", "lion", "muon"):
        yield {"sgd": "SGD", "lion": "Lion", "muon": "Muon"}[name]


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [*(value or ())]
