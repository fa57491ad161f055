"""A layer spec of HybridModel without Transformer Engine, unlike Megatron's own.

    --spec tests.specs.hybrid hybrid_stack_spec

It has attention, dense and MoE layers; Mamba layers have kernels for GPUs alone.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import moe_module_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)


def _moe_layer(**options: Any) -> Any:
    """Build an MoE layer of the kind now in force: the spec outlives switches of FSEP."""
    build = moe_module_specs.get_moe_module_spec(use_te=False, num_experts=1)
    return build(**options)


_GPT = get_gpt_layer_local_submodules(normalization="RMSNorm")
_NORMS_AND_PROJECTION = MultiTokenPredictionLayerSubmodules(
    enorm=WrappedTorchNorm,
    hnorm=WrappedTorchNorm,
    eh_proj=ColumnParallelLinear,
    mtp_model_layer=None,  # the pattern selects it
    layer_norm=WrappedTorchNorm,
)

hybrid_stack_spec = ModuleSpec(
    module=HybridStack,
    submodules=HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=_GPT.input_layernorm,
                self_attention=_GPT.self_attention,
                self_attn_bda=_GPT.self_attn_bda,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=_GPT.pre_mlp_layernorm, mlp=_GPT.mlp, mlp_bda=_GPT.mlp_bda
            ),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=_GPT.pre_mlp_layernorm, mlp=_moe_layer, mlp_bda=_GPT.mlp_bda
            ),
        ),
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                layer_specs=[
                    ModuleSpec(module=MultiTokenPredictionLayer, submodules=_NORMS_AND_PROJECTION)
                ]
            ),
        ),
    ),
)
