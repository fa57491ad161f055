"""Memory of a rank by part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_laer.choices import Sharding
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.simulator.iteration.memory_parts import memory_bytes
from megatron_laer.tools.simulator.iteration.methods import (
    FSEP,
    STOCK,
    MethodSettings,
    make_method,
)
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.run_shape import RunShape

H100 = replace(load_cluster("h100-8"), spreads=())


@pytest.mark.parametrize(
    ("strategy", "dense_gb"),
    [(None, 10.2), ("optim", 10.2), ("optim_grads", 4.0), ("optim_grads_params", 1.4)],
)
def test_sharded_dense_layers_take_the_documented_memory(strategy, dense_gb):
    """On 32 ranks in groups of 8 whose experts' optimizer state four ranks share."""
    model = read_model("mixtral-8x7b-e8k2")
    geometry = Geometry(8, 8, 2, 8, Sharding.EXPERTS)
    costs = CostModel(H100, model.hidden, model.expert_ffn, True, 2)
    run = RunShape(8, 8, 4096, 1, replicas=4, dense_sharding=strategy)
    experts = len(model.layer_has_experts) * model.expert_weights  # one of each layer on a rank
    names = ("weights", "gradients", "optimizer")
    for name in (FSEP, STOCK):
        settings = MethodSettings(geometry, costs, stock_group=8)
        method = make_method(name, settings, Rates(H100, 2))
        parts = memory_bytes(model, run, method, 8192)
        found = sum(parts[part] for part in names)
        whole = 2 + 4 + 12 / 4  # bytes of an expert's weight, gradient and quarter of its state
        assert found - experts * whole == pytest.approx(dense_gb * 1e9, rel=0.03)
        assert ("gathered_layers" in parts) == (strategy == "optim_grads_params")
