"""Adapters of home experts, as far as no group of ranks is needed to find them and use them."""

from __future__ import annotations

import pytest
import torch

from megatron_laer.layer.experts.adapters import Adapter, find_adapter
from tests.parity.bridge_lora import ALPHA, RANK, LoRALinear


class ParallelLinearAdapter(torch.nn.Module):
    def __init__(self, rank: int = RANK) -> None:
        super().__init__()
        self.alpha, self.dim = ALPHA, rank
        self.activation = self.dropout = torch.nn.Identity()
        self.linear_in = torch.nn.Linear(6, rank, bias=False)
        self.linear_out = torch.nn.Linear(rank, 5, bias=False)


def found(*adapters: torch.nn.Module) -> Adapter:
    wrappers = [LoRALinear(torch.nn.Linear(6, 5), adapter) for adapter in adapters]
    adapter = find_adapter(wrappers, grouped=False)
    assert adapter is not None
    return adapter


def test_disabled_adapters_add_nothing() -> None:
    adapter = found(ParallelLinearAdapter())
    for one in adapter.wrappers:
        one._adapter_enabled = False  # type: ignore[assignment]
    assert adapter.output(torch.randn(4, 6), lambda hidden, at: hidden) is None


def test_experts_with_adapters_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 of 2 home experts have adapters, of unlike"):
        found(ParallelLinearAdapter(), ParallelLinearAdapter(rank=2 * RANK))
