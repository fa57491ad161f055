"""A table lists what a Megatron-Bridge recipe and its model imply and no exported column has.

Read in Megatron-Bridge's source at 067f987d, recipes and performance recipes; each row says where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Implied:
    """Says what recipes have beside their columns.

    Attributes:
        recipes: a regular expression that is searched in `module:function`.
        source: where that is said, and what it means.
        settings: arguments of Megatron, by attribute.
        refused: what no Megatron that FSEP supports can build, with what can.
    """

    recipes: str
    source: str
    settings: Mapping[str, object] = field(default_factory=dict)
    refused: str = ""


type _Settings = dict[str, object]

_SEQUENCE_LOSS: _Settings = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
}
_GLOBAL_LOSS: _Settings = {
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": 1e-3,
}
_AUX_LOSS: _Settings = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3}
_SIGMOID: _Settings = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
_FP32: _Settings = {"moe_router_dtype": "fp32"}
_SHARED: _Settings = {"moe_shared_expert_intermediate_size": 1}  # of some size
_FIRST_DENSE: _Settings = {"moe_layer_freq": "[0,1]"}
_LATENT: _Settings = {"multi_latent_attention": True}
_FUSED: _Settings = {"moe_permute_fusion": True}

# Of a number that is not 0 the number itself is left open.
IMPLIED = (
    Implied(
        r"\.gpt_oss:",
        "the model's experts have a linear bias and clamped gates (gpt_oss_bridge)",
        {"add_bias_linear": True, "activation_func_clamp_value": 7.0} | _FUSED,
    ),
    Implied(
        r"bridge\.recipes\..*\.(gpt_oss|deepseek_v4):.*_fp8",
        "their fp8 recipes set moe_router_padding_for_fp8",
        {"moe_router_padding_for_quantization": True, "moe_router_padding_for_fp8": True},
    ),
    Implied(
        r"\.deepseek_v4:",
        "moe_n_hash_layers, dsv4_hybrid attention, enable_hyper_connections (deepseek_v4_bridge)",
        refused="hash routing, compressed sparse attention and hyper-connections of DeepSeek-V4: "
        "megatron-core 0.19 cannot build the model, and neither can 0.20.0 as developed; it takes "
        "the Megatron that Megatron-Bridge pins, until a release that FSEP supports has them",
    ),
    Implied(
        r"\.deepseek_v2:",
        "multi_latent_attention, a softmax router, first_k_dense_replace (deepseek_v2_bridge)",
        _LATENT | _SEQUENCE_LOSS | _FP32 | _SHARED | _FIRST_DENSE | _FUSED,
    ),
    Implied(
        r"\.(deepseek_v[34]|kimi_\w+|moonlight_\w+|glm5):",
        "multi_latent_attention, a sigmoid router with expert bias, first_k_dense_replace "
        "(deepseek_v3_bridge, kimi_bridge, kimi_k25_vl_bridge, glm5_bridge; Moonlight is a "
        "DeepSeek-V3)",
        _LATENT | _SIGMOID | _SEQUENCE_LOSS | _FP32 | _SHARED | _FIRST_DENSE | _FUSED,
    ),
    Implied(
        r"\.deepseek_v3:",
        "num_nextn_predict_layers 1 and n_group 8, of the checkpoint",
        {"mtp_num_layers": 1, "moe_router_num_groups": 8},
    ),
    Implied(
        r"\.glm5:",
        "an indexer chooses what attention sees (glm5_bridge); mtp_num_layers 1, in each recipe",
        {"experimental_attention_variant": "dsa", "mtp_num_layers": 1},
    ),
    Implied(
        r"\.(glm45|glm_45v):",
        "a sigmoid router with expert bias, first_k_dense_replace (glm45_bridge, glm_45v_bridge)",
        _SIGMOID | _SEQUENCE_LOSS | _FP32 | _SHARED | _FIRST_DENSE | _FUSED,
    ),
    Implied(r"\.glm45:", "num_nextn_predict_layers, of the checkpoint", {"mtp_num_layers": 1}),
    Implied(
        r":qwen3_(?!next|omni)|\.qwen3_omni:",
        "a softmax router with an aux loss (qwen3_moe_bridge, qwen3_vl_bridge, qwen3_omni_bridge)",
        _AUX_LOSS | _FUSED,
    ),
    Implied(
        r"\.(qwen3_next|qwen35|qwen35_vl):|:qwen3_next_",
        "gated delta nets, shared experts with a gate (qwen3_next_bridge, qwen35_bridge, "
        "qwen35_vl_provider); mtp_num_layers 1, in the recipes",
        {"experimental_attention_variant": "gated_delta_net", "moe_shared_expert_gate": True}
        | {"mtp_num_layers": 1}
        | _GLOBAL_LOSS
        | _SHARED
        | _FUSED,
    ),
    Implied(
        r"\.(nemotron_3_\w+|nemotron_omni):|:nemotron_3_",
        "HybridModel, with Mamba layers; the pattern itself is the checkpoint's. A sigmoid router "
        "with expert bias, experts of squared ReLU (nemotron_h_bridge, nemotron_omni_provider)",
        {"hybrid_layer_pattern": "ME*", "gated_linear_unit": False}
        | _SIGMOID
        | _SEQUENCE_LOSS
        | _FP32
        | _SHARED
        | _FUSED,
    ),
    Implied(
        r":nemotron_3_(super|ultra)_",
        "moe_latent_size, of the checkpoint (nemotron_h_bridge)",
        {"moe_latent_size": 1},
    ),
    Implied(
        r"\.nemotron_3_(super|ultra):|:nemotron_3_(super|ultra|5_lightning)",
        "mtp_use_repeated_layer, in each of the recipes",
        {"mtp_use_repeated_layer": True, "mtp_num_layers": 2},
    ),
    Implied(
        r"\.olmoe_7b:",
        "a softmax router (olmoe_bridge)",
        _SEQUENCE_LOSS | _FP32 | _FUSED,
    ),
    Implied(
        r"\.(minimax_m3|exaone_moe):",
        "a sigmoid router with expert bias, some layers dense (minimax_m3_bridge, "
        "exaone_moe_provider)",
        _SIGMOID | _AUX_LOSS | _FP32 | _SHARED | _FIRST_DENSE | _FUSED,
    ),
    Implied(r"\.exaone_moe:", "moe_router_load_balancing_type (exaone_moe_provider)", _GLOBAL_LOSS),
    Implied(
        r"\.(step35|step37):",
        "an aux loss, some layers dense (step35_bridge, step37_bridge)",
        _AUX_LOSS | _FP32 | _SHARED | _FIRST_DENSE | _FUSED,
    ),
    Implied(
        r"\.gemma4_vl:",
        "an aux loss, shared experts (gemma4_provider)",
        _AUX_LOSS | _FP32 | _SHARED | _FUSED,
    ),
    Implied(
        r":nemotron_3_super_pretrain(_64gpu_h100_bf16)?_config$",
        "moe_expert_capacity_factor 1.10 and padding to it, for static shapes with HybridEP; the "
        "performance recipe takes it over from that for training",
        {"moe_expert_capacity_factor": 1.1, "moe_pad_expert_input_to_capacity": True},
    ),
    Implied(
        r"_[fh]sdp_config$|perf_recipes\..*:nemotron_3_ultra_",
        "dist.use_megatron_fsdp and ddp.use_megatron_fsdp",
        {"use_megatron_fsdp": True},
    ),
    Implied(
        r"perf_recipes\..*(:deepseek_v3_.*_[fh]sdp_config$|:deepseek_v3_.*_gb200_.*_partial_cg_dev_"
        r"|:deepseek_v4_pro_|:nemotron_3_ultra_|:nemotron_3_5_lightning_.*_h100_bf16_config$)",
        "fine_grained_activation_offloading, in each of these recipes",
        {"fine_grained_activation_offloading": True},
    ),
    Implied(
        r"perf_recipes\..*:gpt_oss_20b_",
        "moe_router_padding_for_quantization (perf_recipes.gpt_oss.common); cpu_offloading itself "
        "is off",
        {"moe_router_padding_for_quantization": True, "cpu_offloading_num_layers": 0},
    ),
    Implied(
        r"perf_recipes\..*:qwen35_vl_35b_a3b_pretrain_16gpu_h100_bf16_config$",
        "overlap_dispatch_backward_with_experts_wgrad",
        {"overlap_dispatch_backward_with_experts_wgrad": True},
    ),
    Implied(
        r":qwen3_30b_a3b_pretrain_8gpu_gb200_fp8mx_functional_config$",
        "use_transformer_engine_op_fuser, and moe_mlp_glu_interleave_size 32",
        {"use_transformer_engine_op_fuser": True, "moe_mlp_glu_interleave_size": 32},
    ),
)

# LoRA recipes that name layers of attention as their targets; the others take Bridge's default,
# which has linear_fc1 and linear_fc2, or name these themselves.
_LORA_ON_ATTENTION = re.compile(
    r"\.(exaone_moe|glm5|qwen3_moe|nemotron_3_nano_4b):|:moonlight_16b_peft_4gpu"
)


# Folders of megatron.bridge.recipes and perf_recipes whose models were read for the table above.
_KNOWN = re.compile(
    r"^megatron\.bridge\.(perf_)?recipes\.(deepseek|exaone|gemma4_vl|glm|glm_moe_dsa|glm_vl|gpt_oss|"
    r"kimi|kimi_vl|minimax|moonlight|nemotronh|nemotron_omni|olmoe|qwen|qwen_omni|qwen_vl|stepfun)\."
)
UNKNOWN_FAMILY = (
    "its fields alone were judged: what a model has beside them is known of the families in "
    "megatron.bridge.recipes and perf_recipes at 067f987d, and this is none of these; to have all "
    "of it judged give --bridge-recipe NAME, or Megatron's flags"
)


def is_known(recipe: str) -> bool:
    """Tell whether what a recipe's model implies was looked for, by its `module:function`."""
    return _KNOWN.search(recipe) is not None


def implied_by(recipe: str) -> list[Implied]:
    """Return the rows that are about a recipe, by its `module:function`."""
    return [row for row in IMPLIED if re.search(row.recipes, recipe)]


def adapts_experts(recipe: str) -> bool:
    """Tell whether a LoRA recipe adapts experts."""
    return not _LORA_ON_ATTENTION.search(recipe)
