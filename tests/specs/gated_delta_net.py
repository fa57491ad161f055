"""A layer spec of GPT whose layers but the last have a gated delta net instead of attention.

    --spec tests.specs.gated_delta_net block_spec

It has Megatron's local modules, and torch instead of the kernels of flash-linear-attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt import moe_module_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common, gdn
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


def block_spec(config: Any) -> TransformerBlockSubmodules:
    _replace_kernels()
    attention = get_gpt_layer_local_spec(normalization="RMSNorm")
    # Not at import, since the kind of an MoE layer changes with the switch of FSEP.
    attention.submodules.mlp = moe_module_specs.get_moe_module_spec(use_te=False, num_experts=1)
    linear = copy.deepcopy(attention)
    linear.submodules.self_attention = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
        ),
    )
    layers = config.transformer.num_layers
    return TransformerBlockSubmodules(
        layer_specs=[linear] * (layers - 1) + [attention], layer_norm=WrappedTorchNorm
    )


def _replace_kernels() -> None:
    common.HAVE_FLA = True
    common.l2norm = _unit_length
    gdn.causal_conv1d = _causal_conv1d
    gdn.chunk_gated_delta_rule = common.torch_chunk_gated_delta_rule


def _unit_length(vectors: torch.Tensor) -> torch.Tensor:
    squares = vectors.float().square().sum(-1, keepdim=True)
    return (vectors * torch.rsqrt(squares + 1e-6)).to(vectors.dtype)


def _causal_conv1d(
    *, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Convolve each channel `d` of `[b, s, d]` with the past, and apply SiLU."""
    width = weight.shape[1]
    padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
    convolved = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight))
    return torch.nn.functional.silu(convolved).transpose(1, 2), None
