"""Models with frozen weights, wholly except adapters or in part, the same in stock and FSEP.

These functions of the parity table's rows change a model chunk before Megatron wraps it.
"""

from __future__ import annotations

from typing import Any

import torch

_RANK = 4


class LowRank(torch.nn.Module):
    """Linear layer of attention with an added product of two narrow matrices."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        weight: Any = linear.weight
        rows, columns = weight.shape
        self.base = linear
        self.down = torch.nn.Parameter(torch.zeros(_RANK, columns, dtype=weight.dtype))
        self.up = torch.nn.Parameter(torch.zeros(rows, _RANK, dtype=weight.dtype))

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = self.base(input, *args, **kwargs)
        low = torch.nn.functional.linear(input, self.down)
        return output + torch.nn.functional.linear(low, self.up), bias


def lora_on_attention(model: torch.nn.Module) -> None:
    model.requires_grad_(False)
    for layer in [*model.modules()]:
        if hasattr(layer, "self_attention"):
            attention: Any = layer.self_attention
            attention.linear_qkv = LowRank(attention.linear_qkv)
            attention.linear_proj = LowRank(attention.linear_proj)
    let_layers_be_checkpoints(model)


def let_layers_be_checkpoints(model: torch.nn.Module) -> None:
    """Let the embedding's output need a gradient, as a checkpoint's input must."""
    embedding = getattr(model, "embedding", None)
    if embedding is not None:
        embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())


def frozen_in_part(model: torch.nn.Module) -> None:
    """Freeze the embedding, the first layer, and the first matrix of every expert of the others."""
    for name, parameter in model.named_parameters():
        is_first = name.startswith(("embedding.", "decoder.layers.0."))
        if is_first or (".experts." in name and "linear_fc1" in name):
            parameter.requires_grad = False
