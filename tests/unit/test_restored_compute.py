"""The activation of restored experts, of which a rank often has no tokens."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch._dynamo.testing import CompileCounter

from megatron_laer.layer.experts.restored_compute import RestoredCompute

FFN = 6


def test_a_fused_activation_is_not_compiled_again_for_a_rank_without_tokens() -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=1,
        num_moe_experts=2,
        moe_ffn_hidden_size=FFN,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
    )
    group: Any = object()  # MLP asks it nothing without linear layers
    compute: Any = RestoredCompute(
        config, tp_group=group, device=torch.device("cpu"), gemm="loop", activation_builder=None
    )
    counter = CompileCounter()
    compute.activation = torch.compile(compute.activation, backend=counter)  # as `jit_fuser` does

    def activate(tokens: int) -> None:
        hidden_TF = torch.ones(tokens, 2 * FFN, requires_grad=True)
        output_TF = compute._activate(hidden_TF, torch.ones(tokens))
        assert output_TF.shape == (tokens, FFN)
        output_TF.sum().backward()
        assert hidden_TF.grad is not None

    for tokens in (7, 5, 9):
        activate(tokens)
    assert (compiled := counter.frame_count) > 0
    for tokens in (0, 8, 0):
        activate(tokens)
    assert counter.frame_count == compiled
