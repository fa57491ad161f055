"""Adapters of home experts, as far as no group of ranks is needed to find them and use them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_laer.layer.experts.adapters import Adapter, find_adapter
from tests.parity.bridge_lora import ALPHA, RANK, GroupedExpertLinearAdapter, LoRALinear

CONFIG = SimpleNamespace(params_dtype=torch.float32)


class Narrow(torch.nn.Linear):
    """Linear layer with Megatron's result."""

    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), None


class ParallelLinearAdapter(torch.nn.Module):
    def __init__(self, rank: int = RANK) -> None:
        super().__init__()
        self.alpha, self.dim = ALPHA, rank
        self.activation = self.dropout = torch.nn.Identity()
        self.linear_in = Narrow(6, rank, bias=False)
        self.linear_out = Narrow(rank, 5, bias=False)


def wrapper(adapter: torch.nn.Module) -> LoRALinear:
    return LoRALinear(torch.nn.Linear(6, 5), adapter)


def found(*adapters: torch.nn.Module, grouped: bool = False) -> Adapter:
    adapter = find_adapter([*map(wrapper, adapters)], grouped=grouped)
    assert adapter is not None
    return adapter


def shared_adapter() -> ParallelLinearAdapter:
    adapter = ParallelLinearAdapter()
    for parameter in adapter.parameters():
        parameter.register_hook(lambda grad: grad)
    return adapter


def test_each_experts_matrices_travel_in_the_order_of_their_products() -> None:
    adapters = [ParallelLinearAdapter() for _ in range(3)]
    adapter = found(*adapters)
    assert adapter.homes == (
        tuple(one.linear_in.weight for one in adapters),
        tuple(one.linear_out.weight for one in adapters),
    )
    tokens = torch.randn(4, 6)
    expected = adapters[1].linear_out(adapters[1].linear_in(tokens)[0])[0] * (ALPHA / RANK)
    of_second = adapter.output(tokens, lambda hidden, at: hidden @ adapter.homes[at][1].t())
    assert of_second is not None and torch.equal(of_second, expected)


def test_experts_in_one_parameter_are_one_matrix_each() -> None:
    packed = GroupedExpertLinearAdapter(6, 5, CONFIG, num_experts=3)
    adapter = found(packed, grouped=True)
    assert adapter.homes == ((packed.linear_in.weight,), (packed.linear_out.weight,))


def test_a_layer_that_experts_share_is_called_and_does_not_travel() -> None:
    shared, tokens = shared_adapter(), torch.randn(4, 6)
    adapter = found(shared, grouped=True)
    assert adapter.homes == () and adapter.trains_shared
    expected = shared.linear_out(shared.linear_in(tokens)[0])[0] * (ALPHA / RANK)
    output = adapter.output(tokens, lambda hidden, at: pytest.fail("nothing travels"))
    assert output is not None and torch.equal(output, expected)


def test_ranks_compare_the_values_that_experts_share() -> None:
    one, other = shared_adapter(), shared_adapter()
    assert found(one, grouped=True).summary() != found(other, grouped=True).summary()
    other.load_state_dict(one.state_dict())
    assert found(one, grouped=True).summary() == found(other, grouped=True).summary()


def test_disabled_adapters_add_nothing() -> None:
    adapter = found(ParallelLinearAdapter())
    for one in adapter.wrappers:
        one._adapter_enabled = False  # type: ignore[assignment]
    assert adapter.output(torch.randn(4, 6), lambda hidden, at: hidden) is None


def test_experts_with_adapters_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 of 2 home experts have adapters, of unlike"):
        found(ParallelLinearAdapter(), ParallelLinearAdapter(rank=2 * RANK))


def test_linear_layers_without_adapters_have_none() -> None:
    assert find_adapter([torch.nn.Linear(6, 5)], grouped=False) is None
