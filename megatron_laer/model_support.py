"""What FSEP makes of a model's configuration, which scripts of one's own may build without flags.

Refuses what it cannot run, and names every MoE field that no test covers. Megatron's arguments are
checked earlier, in `support`; touches nothing of Megatron.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from typing import Any

logger = logging.getLogger(__name__)

# What a field must be. Fields that an older Megatron does not have are as they must be.
REQUIRED: dict[str, object] = {
    "moe_token_dispatcher_type": "alltoall",
    "expert_tensor_parallel_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "add_bias_linear": False,
    "moe_expert_capacity_factor": None,
    "moe_expert_rank_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_token_dropping": False,
    "moe_mlp_glu_interleave_size": None,
    "moe_single_grouped_weight": False,
    "moe_single_grouped_bias": False,
    "moe_router_padding_for_quantization": False,
    "moe_router_padding_for_fp8": False,
    "moe_paged_stash": False,
    "mtp_use_repeated_layer": False,
    "fine_grained_activation_offloading": False,
    "cpu_offloading": False,
    "fp8": None,
    "fp4": None,
    "cuda_graph_impl": "none",
    "delay_wgrad_compute": False,
    "overlap_moe_expert_parallel_comm": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
}

# Set by a row of the parity table.
PROVED = frozenset(
    """
    num_moe_experts expert_model_parallel_size
    moe_apply_probs_on_input moe_aux_loss_coeff moe_ffn_hidden_size moe_latent_size moe_layer_freq
    moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias
    moe_router_group_topk moe_router_load_balancing_type
    moe_router_num_groups moe_router_pre_softmax
    moe_router_score_function moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_gate
    moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_z_loss_coeff
    """.split()
)

# Change nothing that FSEP does: the reason by field.
WITHOUT_EFFECT: dict[str, str] = {
    "expert_tensor_parallel_num_weight_shards": "what it implies is looked at",
    "inference_moe_disable_fused_quant_kernels": "of inference",
    "inference_moe_token_dispatcher_type": "of inference",
    "moe_grouped_gemm": "FSEP computes with experts of its own",
    "moe_grad_scale_func": "scales the router's losses, which are Megatron's",
    "moe_per_layer_logging": "logs",
    "moe_layer_recompute": "an alias of --recompute-modules moe",
    "moe_token_drop_policy": "of token dropping, which is refused",
    "moe_enable_deepep": "of the flex dispatcher, which is refused",
    "moe_flex_dispatcher_backend": "of the flex dispatcher, which is refused",
    "moe_flex_dispatcher_num_sms": "of the flex dispatcher, which is refused",
    "moe_deepep_num_sms": "of the flex dispatcher, which is refused",
    "moe_permute_fusion_into_hybridep": "of the flex dispatcher, which is refused",
    "moe_hybridep_pad_uneven_dispatch_inputs": "of the flex dispatcher, which is refused",
    "moe_hybridep_num_sms": "of the flex dispatcher, which is refused",
    "moe_hybridep_num_blocks_permute": "of the flex dispatcher, which is refused",
    "moe_hybridep_num_blocks_unpermute": "of the flex dispatcher, which is refused",
    "moe_hybridep_num_sms_preprocessing": "of the flex dispatcher, which is refused",
    "moe_ncclep_static_shape": "of the flex dispatcher, which is refused",
    "moe_ncclep_zero_copy": "of the flex dispatcher, which is refused",
    "moe_pad_experts_for_cuda_graph_inference": "of inference",
    "moe_paged_stash_page_size": "of the paged stash, which is refused",
    "moe_paged_stash_buffer_size_factor_cuda": "of the paged stash, which is refused",
    "moe_paged_stash_buffer_size_factor_cpu": "of the paged stash, which is refused",
}

# FSEP is made to run with these, but no row of the parity table shows it.
UNPROVED = frozenset(
    """
    moe_enable_routing_replay moe_input_jitter_eps moe_permute_fusion moe_router_force_biased
    moe_router_force_load_balancing moe_router_fusion moe_router_quantile_balancing_ema
    moe_router_topk_limited_devices
    moe_shared_expert_glu_interleave_size use_grouped_gemm_for_shared_expert
    """.split()
)


# What rows of the parity table recompute, of Megatron's selective recompute.
PROVED_RECOMPUTE = frozenset({"core_attn", "layernorm", "mlp", "moe", "shared_experts"})

# Of Megatron's fields, those whose names say that they are about MoE.
MOE_FIELD = re.compile(r"moe|expert|router")


NO_PROOF = "no test proves that it works with FSEP"


def check(config: Any) -> None:
    """Refuse a model that FSEP cannot run, and warn of MoE fields that no test covers.

    Args:
        config: Megatron's TransformerConfig.

    Raises:
        ValueError: the fields, and what would work.
    """
    problems = [
        f"{name}={getattr(config, name)!r}: must be {value!r}"
        for name, value in REQUIRED.items()
        if not _is_as_required(getattr(config, name, value), value)
    ]
    if config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules:
        problems.append("recompute_modules with 'moe_act': use 'moe'")
    if problems:
        raise ValueError("FSEP cannot run this model:\n  " + "\n  ".join(problems))
    for warning in warnings_of(config):
        _warn_once(warning)


def _is_as_required(value: object, required: object) -> bool:
    """Whether a field is as it must be; off is off, said by None or by False."""
    is_off = value is None or value is False
    return value == required or (is_off and (required is None or required is False))


def warnings_of(config: Any) -> list[str]:
    """A warning for each setting about MoE or recompute that no test covers."""
    found = []
    for field in dataclasses.fields(config):
        if not MOE_FIELD.search(field.name) or field.name in REQUIRED:
            continue
        value = getattr(config, field.name)
        if field.name in PROVED or field.name in WITHOUT_EFFECT or value == _default(field):
            continue
        why = (
            NO_PROOF
            if field.name in UNPROVED
            else "megatron_laer does not know this field, and FSEP may not honour it"
        )
        found.append(f"{field.name}={value!r}: {why}")
    if config.recompute_granularity == "selective":
        unproved = sorted(set(config.recompute_modules) - PROVED_RECOMPUTE)
        found += [f"recompute_modules with {name!r}: {NO_PROOF}" for name in unproved]
    return found


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache  # every layer has the same configuration
def _warn_once(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning(text)
