"""Home experts whose products no replica computes are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_laer.environment import GROUPED_TENSORS
from megatron_laer.layer.experts.homes import HomeExperts


def grouped_experts() -> tuple[Any, HomeExperts]:
    """Return a grouped linear layer of two experts, and the experts that have it."""
    module: Any = torch.nn.Module()
    module.linear_fc1 = linear = torch.nn.Module()
    for expert in range(2):
        linear.register_parameter(f"weight{expert}", torch.nn.Parameter(torch.zeros(2, 2)))
    compute: Any = SimpleNamespace(
        linears=[SimpleNamespace(name="linear_fc1")], adapters=[None], has_bias=False, packers=()
    )
    return linear, HomeExperts(module, 2, compute)


def test_transformer_engines_grouped_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, experts = grouped_experts()
    for value, is_refused in ((None, False), ("0", False), ("1", True)):
        if value is not None:
            monkeypatch.setenv(GROUPED_TENSORS, value)
        problem = experts.what_changed()
        assert (problem is not None) == is_refused
    assert problem is not None and f"{GROUPED_TENSORS} other than 0" in problem
    monkeypatch.delenv(GROUPED_TENSORS)
    linear.use_grouped_tensor = True
    problem = experts.what_changed()
    assert problem is not None and "use_grouped_tensor" in problem and "leave both out" in problem
