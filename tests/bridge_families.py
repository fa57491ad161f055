"""Settings that a Megatron-Bridge recipe and its model imply, and that no exported column has.

Source: Megatron-Bridge at 067f987d, recipes and performance recipes. Each row has a comment with
the place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Implied(NamedTuple):
    """Settings of the recipes whose `module:function` matches the regular expression `recipes`.

    `settings` are Megatron's arguments, by attribute.
    """

    recipes: str
    settings: Mapping[str, object]


def _balanced(kind: str, coefficient: float) -> dict[str, object]:
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coefficient}


# Nonzero numbers are placeholders, whose size is left open.
_GROUPS: Mapping[str, Mapping[str, object]] = {
    "sequence-loss": _balanced("seq_aux_loss", 1e-4),
    "global-loss": _balanced("global_aux_loss", 1e-3),
    "aux-loss": _balanced("aux_loss", 1e-3),
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "fp32": {"moe_router_dtype": "fp32"},
    "shared": {"moe_shared_expert_intermediate_size": 1},
    "first-dense": {"moe_layer_freq": "[0,1]"},
    "latent": {"multi_latent_attention": True},
    "fused": {"moe_permute_fusion": True},
    "mtp": {"mtp_num_layers": 1},
}


def _row(recipes: str, groups: str = "", **settings: object) -> Implied:
    in_groups = {key: value for name in groups.split() for key, value in _GROUPS[name].items()}
    return Implied(recipes, in_groups | settings)


IMPLIED = (
    # Experts have a linear bias and clamped gates (gpt_oss_bridge).
    _row(r"\.gpt_oss:", "fused", add_bias_linear=True, activation_func_clamp_value=7.0),
    # Their fp8 recipes set moe_router_padding_for_fp8.
    _row(
        r"bridge\.recipes\..*\.(gpt_oss|deepseek_v4):.*_fp8",
        moe_router_padding_for_quantization=True,
        moe_router_padding_for_fp8=True,
    ),
    # A softmax router, first_k_dense_replace (deepseek_v2_bridge).
    _row(r"\.deepseek_v2:", "latent sequence-loss fp32 shared first-dense fused"),
    # deepseek_v3_bridge, kimi_bridge, kimi_k25_vl_bridge, glm5_bridge; Moonlight is a DeepSeek-V3.
    _row(
        r"\.(deepseek_v[34]|kimi_\w+|moonlight_\w+|glm5):",
        "latent sigmoid sequence-loss fp32 shared first-dense fused",
    ),
    # num_nextn_predict_layers 1 and n_group 8, of the checkpoint.
    _row(r"\.deepseek_v3:", "mtp", moe_router_num_groups=8),
    # An indexer chooses the tokens that attention sees (glm5_bridge).
    _row(r"\.glm5:", "mtp", experimental_attention_variant="dsa"),
    # glm45_bridge, glm_45v_bridge.
    _row(r"\.(glm45|glm_45v):", "sigmoid sequence-loss fp32 shared first-dense fused"),
    # num_nextn_predict_layers, of the checkpoint.
    _row(r"\.glm45:", "mtp"),
    # A softmax router (qwen3_moe_bridge, qwen3_vl_bridge, qwen3_omni_bridge).
    _row(r":qwen3_(?!next|omni)|\.qwen3_omni:", "aux-loss fused"),
    # qwen3_next_bridge, qwen35_bridge, qwen35_vl_provider; mtp_num_layers 1, in the recipes.
    _row(
        r"\.(qwen3_next|qwen35|qwen35_vl):|:qwen3_next_",
        "mtp global-loss shared fused",
        experimental_attention_variant="gated_delta_net",
        moe_shared_expert_gate=True,
    ),
    # HybridModel, with the checkpoint's pattern, and experts of squared ReLU
    # (nemotron_h_bridge, nemotron_omni_provider).
    _row(
        r"\.(nemotron_3_\w+|nemotron_omni):|:nemotron_3_",
        "sigmoid sequence-loss fp32 shared fused",
        hybrid_layer_pattern="ME*",
        gated_linear_unit=False,
    ),
    # The checkpoint's latent size (nemotron_h_bridge).
    _row(r":nemotron_3_(super|ultra)_", moe_latent_size=1),
    # Set in each of the recipes.
    _row(
        r"\.nemotron_3_(super|ultra):|:nemotron_3_(super|ultra|5_lightning)",
        mtp_use_repeated_layer=True,
        mtp_num_layers=2,
    ),
    # A softmax router (olmoe_bridge).
    _row(r"\.olmoe_7b:", "sequence-loss fp32 fused"),
    # minimax_m3_bridge, exaone_moe_provider.
    _row(r"\.(minimax_m3|exaone_moe):", "sigmoid aux-loss fp32 shared first-dense fused"),
    # exaone_moe_provider.
    _row(r"\.exaone_moe:", "global-loss"),
    # step35_bridge, step37_bridge.
    _row(r"\.(step35|step37):", "aux-loss fp32 shared first-dense fused"),
    # gemma4_provider.
    _row(r"\.gemma4_vl:", "aux-loss fp32 shared fused"),
    # Static shapes for HybridEP; the performance recipe inherits this from the training recipe.
    _row(
        r":nemotron_3_super_pretrain(_64gpu_h100_bf16)?_config$",
        moe_expert_capacity_factor=1.1,
        moe_pad_expert_input_to_capacity=True,
    ),
    # dist.use_megatron_fsdp and ddp.use_megatron_fsdp.
    _row(r"_[fh]sdp_config$|perf_recipes\..*:nemotron_3_ultra_", use_megatron_fsdp=True),
    # Set in each of these recipes.
    _row(
        r"perf_recipes\..*(:deepseek_v3_.*_[fh]sdp_config$|:deepseek_v3_.*_gb200_.*_partial_cg_dev_"
        r"|:deepseek_v4_pro_|:nemotron_3_ultra_|:nemotron_3_5_lightning_.*_h100_bf16_config$)",
        fine_grained_activation_offloading=True,
    ),
    # perf_recipes.gpt_oss.common; cpu_offloading itself is off.
    _row(
        r"perf_recipes\..*:gpt_oss_20b_",
        moe_router_padding_for_quantization=True,
        cpu_offloading_num_layers=0,
    ),
    # recipes.qwen_vl.h100.qwen35_vl, in its policy for 16 cards.
    _row(
        r":qwen35_vl_35b_a3b_(pretrain|sft)_16gpu_h100_bf16_(functional_)?config$",
        overlap_dispatch_backward_with_experts_wgrad=True,
        overlap_grad_reduce=False,
    ),
    _row(
        r":qwen3_30b_a3b_pretrain_8gpu_gb200_fp8mx_functional_config$"
        r"|:nemotron_3_(super_pretrain_64gpu|nano_pretrain_8gpu)_(gb200|gb300|vr200)_fp8mx_config$",
        use_transformer_engine_op_fuser=True,
        moe_mlp_glu_interleave_size=32,
    ),
)

# LoRA recipes that name attention layers as their targets; the others use Bridge's default, which
# has linear_fc1 and linear_fc2, or name these themselves.
_LORA_ON_ATTENTION = re.compile(
    r"\.(exaone_moe|glm5|qwen3_moe|nemotron_3_nano_4b):|:moonlight_16b_peft_4gpu"
)
# Folders of megatron.bridge.recipes and perf_recipes whose models the table above covers.
_KNOWN = re.compile(
    r"^megatron\.bridge\.(perf_)?recipes\.(deepseek|exaone|gemma4_vl|glm|glm_moe_dsa|glm_vl|gpt_oss|"
    r"kimi|kimi_vl|minimax|moonlight|nemotronh|nemotron_omni|olmoe|qwen|qwen_omni|qwen_vl|stepfun)\."
)


def implied_by(recipe: str) -> list[Implied]:
    assert _KNOWN.search(recipe), f"{recipe}: its model's settings are in no row above"
    return [row for row in IMPLIED if re.search(row.recipes, recipe)]


def adapts_experts(recipe: str) -> bool:
    return not _LORA_ON_ATTENTION.search(recipe)
