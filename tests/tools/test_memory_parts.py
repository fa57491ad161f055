"""Memory of a rank by part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_laer.choices import PlanMode, Sharding
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
from megatron_laer.tools.simulator.iteration.model_shape import Lora, read_model
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


ADAPTED = replace(read_model("qwen3-30b-a3b"), lora=Lora(32))


def parts_of(model, name=FSEP, **settings):
    """Return the bytes by part on 8 ranks of 32, with one replica slot."""
    geometry = Geometry(8, 128, 17, 8, Sharding.EXPERTS)
    costs = CostModel(H100, model.hidden, model.expert_ffn, True, 2)
    made = MethodSettings(geometry, costs, stock_group=8, **settings)
    run = RunShape(8, 8, 4096, 1, replicas=4)
    return memory_bytes(model, run, make_method(name, made, Rates(H100, 2)), 32768)


def test_frozen_bases_have_neither_gradients_nor_optimizer_state():
    """An expert of 2048 x 768 has 32 * (2048 + 1536 + 768 + 2048) adapters' weights, a layer's
    attention 32 * (2048 + 5120 + 4096 + 2048)."""
    expert, attention = 204_800, 425_984
    dense, experts = 48 * attention, 48 * 16 * expert
    for name in (FSEP, STOCK):
        whole, adapted = parts_of(replace(ADAPTED, lora=None), name), parts_of(ADAPTED, name)
        assert adapted["weights"] - whole["weights"] == 2 * (dense + experts)
        assert adapted["gradients"] == 4 * (dense + experts)
        assert adapted["optimizer"] == 12 * (dense / 32 + experts / 4)
    held = parts_of(ADAPTED, mode=PlanMode.FORECAST, holds_step=True)
    assert held["restored_experts"] == 48 * 2 * (3 * 2048 * 768 + expert)
    assert held["restored_gradients"] >= 48 * 4 * expert
    assert held["restored_gradients"] < 48 * 8 * expert, "those of bases are not sent"


def test_adapters_are_those_of_the_targets():
    for targets, expert, dense in (
        (("linear_fc1",), 32 * (2048 + 1536), 0),
        (("linear_fc2",), 32 * (768 + 2048), 0),
        (("linear_qkv",), 0, 32 * (2048 + 5120)),
        (("linear_proj",), 0, 32 * (4096 + 2048)),
    ):
        model = replace(ADAPTED, lora=Lora(32, targets))
        assert model.expert_adapters == expert
        assert model.dense_adapters(True) == dense
        assert model.dense_adapters(False) >= dense
