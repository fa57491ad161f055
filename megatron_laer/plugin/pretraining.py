"""Differences between releases of Megatron (`megatron_laer/releases.py`), for our training script.

Newer releases build a GPT model from a configuration. Older ones need a function for it, and their
wheel has none.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_laer.releases import GPT_FROM_CONFIG, PACKED_SEQUENCES


def pretrain_arguments(args: Namespace) -> dict[str, Any]:
    """Return the keywords of Megatron's `pretrain` for the model and its configuration.

    The model is a HybridModel with `--hybrid-layer-pattern`, else a GPT model.

    Raises:
        ValueError: an option that is given and that `build_gpt`, if needed, does not support.
    """
    from megatron.training import argument_utils

    container = argument_utils.pretrain_cfg_container_from_args
    if GPT_FROM_CONFIG.is_in(argument_utils):
        is_hybrid = args.hybrid_layer_pattern is not None
        from_args = "hybrid_config_from_args" if is_hybrid else "gpt_config_from_args"
        return {"cfg_container": container(args, getattr(argument_utils, from_args)(args))}
    asked = [name for name in _NOT_BUILT if getattr(args, name, None) not in (None, False)]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
    if args.num_experts is None:
        flags = "no --num-experts"
    if flags:
        raise ValueError(
            f"{flags}: with megatron-core {' or '.join(GPT_FROM_CONFIG.lacked_by())} this script "
            f"builds plain MoE models only; use {GPT_FROM_CONFIG.since}, or Megatron's own script: "
            "`python -m megatron_laer train PATH/pretrain_gpt.py -- ARGS`"
        )
    return {"cfg_container": container(args), "model_provider": build_gpt}


# Options that such a Megatron leaves to the function that builds the model, and ours lacks.
_NOT_BUILT = (
    "hybrid_layer_pattern",
    "spec",
    "yaml_cfg",
    "experimental_attention_variant",
    "heterogeneous_layers_config_path",
    "record_memory_history",
)


def no_packed_sequences() -> dict[str, bool]:
    """Return the keyword by which `get_batch_on_this_tp_rank` packs no sequences."""
    from megatron.core.utils import get_batch_on_this_tp_rank

    has_it = PACKED_SEQUENCES.is_in(get_batch_on_this_tp_rank)
    return {"has_cu_seqlens" if has_it else "is_sft": False}


def build_gpt(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build one chunk of the MoE GPT model; for releases without `GPT_FROM_CONFIG`."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    use_te = args.transformer_impl == "transformer_engine"
    layer_flags = {"normalization": args.normalization, "qk_l2_norm": args.qk_l2_norm}
    mtp_block = None
    if args.mtp_num_layers is not None:
        # Like the last layer of the model, which may be on another stage.
        layers = gpt_layer_specs.get_gpt_decoder_layer_specs(config, use_te, **layer_flags)
        mtp_block = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, layers[-1], use_te, vp_stage=vp_stage
        )
    return GPTModel(
        config,
        gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_te, vp_stage=vp_stage, **layer_flags
        ),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process,
        post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=mtp_block,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
