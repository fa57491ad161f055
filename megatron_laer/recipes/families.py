"""A table lists what a Megatron-Bridge recipe's model implies and no exported column has.

Read in Megatron-Bridge's source at 067f987d; each row says where.
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


IMPLIED = (
    Implied(
        r"\.gpt_oss:",
        "the model's experts have a linear bias and clamped gates (gpt_oss_bridge)",
        {"add_bias_linear": True, "activation_func_clamp_value": 7.0},
    ),
    Implied(
        r"\.(gpt_oss|deepseek_v4):.*_fp8",
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
        r"\.(deepseek_v\d|kimi_\w+|moonlight_\w+|glm5):",
        "multi_latent_attention (deepseek_v2_bridge and v3, kimi_bridge, kimi_k25_vl_bridge, "
        "glm5_bridge; Moonlight is a DeepSeek-V3)",
        {"multi_latent_attention": True},
    ),
    Implied(
        r"\.(qwen3_next|qwen35|qwen35_vl):",
        "gated delta nets (qwen3_next_bridge, qwen35_bridge, qwen35_vl_provider)",
        {"experimental_attention_variant": "gated_delta_net"},
    ),
    Implied(
        r"\.(nemotron_3_\w+|nemotron_omni):",
        "HybridModel (nemotron_h_bridge); the pattern itself is the checkpoint's",
        {"hybrid_layer_pattern": "ME*"},
    ),
    Implied(
        r"\.nemotron_3_(super|ultra):|:nemotron_3_5_lightning",
        "mtp_use_repeated_layer, in each of the recipes",
        {"mtp_use_repeated_layer": True},
    ),
    Implied(
        r":nemotron_3_super_pretrain_config$",
        "moe_expert_capacity_factor 1.10 and padding to it, for static shapes with HybridEP",
        {"moe_expert_capacity_factor": 1.1, "moe_pad_expert_input_to_capacity": True},
    ),
    Implied(
        r"_fsdp_config$",
        "dist.use_megatron_fsdp and ddp.use_megatron_fsdp",
        {"use_megatron_fsdp": True},
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
LORA_ON_EXPERTS = (
    "LoRA on linear_fc1 and linear_fc2, which experts have too: Megatron-Bridge wraps the linear "
    "layers that it knows, and FSEP computes experts from slices; give target_modules with layers "
    "of attention alone, such as linear_qkv and linear_proj"
)


# Folders of megatron.bridge.recipes whose models were read for the table above.
_KNOWN = re.compile(
    r"^megatron\.bridge\.recipes\.(deepseek|exaone|gemma4_vl|glm|glm_vl|gpt_oss|kimi|kimi_vl|minimax|"
    r"moonlight|nemotronh|nemotron_omni|olmoe|qwen|qwen_omni|qwen_vl|stepfun)\."
)
UNKNOWN_FAMILY = (
    "its fields alone were judged: what a model has beside them is known of the families in "
    "megatron.bridge.recipes at 067f987d, and this is none of these; to have all of it judged give "
    "--bridge-recipe NAME, or Megatron's flags"
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
