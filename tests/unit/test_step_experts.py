"""Experts that are held over a step: their needs and their memory."""

from __future__ import annotations

import pytest
import torch

from megatron_laer.layer.experts.main_grads import MegatronMainGrads
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.exchange import HierarchicalExchange
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.weights.exchange_streams import ExchangeStreams
from megatron_laer.runtime.weights.layer import Slices
from megatron_laer.runtime.weights.step_experts import StepExperts, memory_held


def slices(dtype: torch.dtype = torch.float32) -> Slices:
    shapes = [(4, 4, 3), (4, 2, 4)]
    parameters = tuple(torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)
    return Slices(parameters, (8, 3), MegatronMainGrads())


def test_parameters_without_main_gradients_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = layout_index(ExpertLayout.static(2, 3, 4), torch.device("cpu"))
    streams = ExchangeStreams(HierarchicalExchange, None, None)  # type: ignore[arg-type]  # unused
    held = slices()
    with pytest.raises(ValueError, match=r"step, layer 1: .*DistributedDataParallel"):
        StepExperts("layer 1", held, index, streams)
    for parameter in held.parameters:
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    StepExperts("layer 1", held, index, streams)


def test_memory_is_that_of_slots_and_of_float32_sums() -> None:
    elements = 2 * 1024 * (8 * 3 + 3 * 4)  # two layers with 1024 slots
    text = memory_held([slices(torch.bfloat16)] * 2, capacity=1024)
    assert "2 layers" in text
    assert f"({2 * elements / 2**20:.1f} MiB)" in text
    assert f"({4 * elements / 2**20:.1f} MiB)" in text
    frozen = slices(torch.bfloat16)
    for parameter in frozen.parameters:
        parameter.requires_grad = False
    assert "sums of their gradients (0.0 MiB)" in memory_held([frozen], capacity=1024)
