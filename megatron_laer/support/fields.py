"""MoE fields of Megatron's TransformerConfig that FSEP does not refuse.

Each is proved by a parity row, or without effect. Fields that are neither here nor in `table` exist
only in a Megatron that is not known yet, and are warned of.
"""

from __future__ import annotations

import re

# Names of Megatron's fields about MoE.
MOE_FIELD = re.compile(r"moe|expert|router")

# Fields that rows of the parity table set.
PROVED = frozenset(
    """
    num_moe_experts expert_model_parallel_size
    moe_apply_probs_on_input moe_aux_loss_coeff moe_enable_routing_replay
    moe_ffn_hidden_size moe_hybridep_pad_uneven_dispatch_inputs moe_input_jitter_eps moe_latent_size
    moe_layer_freq
    moe_permute_fusion moe_permute_fusion_into_hybridep
    moe_router_bias_update_rate moe_router_dtype moe_router_enable_expert_bias
    moe_router_force_biased moe_router_force_load_balancing moe_router_fusion
    moe_router_group_topk moe_router_load_balancing_type
    moe_router_num_groups moe_router_pre_softmax moe_router_quantile_balancing_ema
    moe_router_score_function moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_gate
    moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_z_loss_coeff
    overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm
    """.split()
)

# Fields of Megatron's main branch about kernels, or layers around the experts. No test has set
# them, so they are warned of.
UNTRIED = frozenset(
    """
    batch_invariant_backend enable_mhc_connections gdp_cutedsl_kernel
    gdp_num_chunk_states_to_recompute gdp_num_householder gtp_remat_opt_in_modules mtp_hsm
    """.split()
)

# Fields without effect on FSEP, by the reason.
WITHOUT_EFFECT_BY_REASON: dict[str, str] = {
    "FSEP computes the experts itself, in place of Megatron's grouped experts": """
        moe_grouped_gemm
        """,
    "Megatron scales the router's losses by it, and FSEP leaves those losses to Megatron": """
        moe_grad_scale_func
        """,
    "it is Megatron's old name for --moe-router-padding-for-quantization, which has rows": """
        moe_router_padding_for_fp8
        """,
    "it only chooses what Megatron logs": """
        moe_per_layer_logging
        """,
    "it is Megatron's old name for --recompute-modules moe, which is proved": """
        moe_layer_recompute
        """,
    "it is Megatron's old name for --moe-router-group-topk, which is proved": """
        moe_router_topk_limited_devices
        """,
    "Megatron derives expert_gtp_weight_remat_size from it, and that field is checked": """
        expert_tensor_parallel_num_weight_shards
        """,
    "it only acts in inference, and FSEP trains": """
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        moe_pad_experts_for_cuda_graph_inference
        """,
    "it configures token dropping, which is refused": """
        moe_token_drop_policy
        """,
    "it only says how much of a GPU the flex dispatcher's kernels take": """
        moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing
        """,
    "it is Megatron's old name for --moe-flex-dispatcher-backend deepep, which has rows": """
        moe_enable_deepep
        """,
    "it configures NCCL EP, which is refused": """
        moe_ncclep_static_shape moe_ncclep_zero_copy
        """,
    "it configures the paged stash, which is refused": """
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu
        """,
}
WITHOUT_EFFECT = {
    field: reason for reason, fields in WITHOUT_EFFECT_BY_REASON.items() for field in fields.split()
}
