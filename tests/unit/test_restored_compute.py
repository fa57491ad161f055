"""The activation of restored experts, of which a rank often has no tokens."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch._dynamo.testing import CompileCounter

from megatron_laer.layer.experts import restored_compute
from megatron_laer.layer.experts.restored_compute import RestoredCompute

HIDDEN, FFN = 4, 6


def make_compute(**settings: Any) -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=2,
        moe_ffn_hidden_size=FFN,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        **settings,
    )
    group: Any = object()  # MLP asks it nothing without linear layers
    return RestoredCompute(
        config, tp_group=group, device=torch.device("cpu"), gemm="loop", activation_builder=None
    )


def test_a_fused_activation_is_not_compiled_again_for_a_rank_without_tokens() -> None:
    compute = make_compute()
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


def test_probabilities_on_the_input_are_not_on_the_output_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    input_TH, probs_T = torch.randn(5, HIDDEN, generator=generator), torch.rand(5)
    matrices = [
        torch.randn(*size, generator=generator) for size in ((HIDDEN, 2 * FFN), (FFN, HIDDEN))
    ]
    monkeypatch.setattr(
        restored_compute, "slot_linear", lambda input_TK, _, __, at, *___: input_TK @ matrices[at]
    )
    restored = mock.Mock(before_compute=lambda *inputs: (inputs, [None, None]))
    usual, on_input = make_compute(), make_compute(moe_apply_probs_on_input=True)
    weighed_TH = probs_T.unsqueeze(1) * input_TH
    expected_TH = usual(weighed_TH, torch.ones(5), restored, [5])
    assert torch.equal(on_input(input_TH, probs_T, restored, [5]), expected_TH)
