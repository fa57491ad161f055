"""Builders of a layer of slots, made from stock's module spec.

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules

from megatron_laer.layer import slot_configs
from megatron_laer.layer.experts.module import FSEPExperts
from megatron_laer.runtime.coordinator import Coordinator


def slot_submodules(
    config: Any, submodules: MoESubmodules, coordinator: Coordinator, pg_collection: Any
) -> MoESubmodules:
    """Return a copy of `submodules` that builds a layer of slots.

    Stock sizes everything behind the router by `config.num_moe_experts`, which is S there. The
    router and the shared experts get the true config. The copy is shallow: layers share
    `submodules`.
    """

    def build_experts(num_local: int, config_: Any, /, **options: Any) -> torch.nn.Module:
        assert num_local == coordinator.geometry.capacity
        if home_slots := coordinator.geometry.home_slots:
            home_config = slot_configs.of_home_experts(config)
            stock: torch.nn.Module = submodules.experts(home_slots, home_config, **options)
            return stock
        return FSEPExperts(
            config,
            groups=coordinator.groups,
            pg_collection=pg_collection,
            device=coordinator.device,
            gemm=coordinator.config.gemm,
            activation_builder=activation_builder(submodules),
        )

    def with_true_config(builder: Any) -> Any:
        return lambda **kwargs: builder(**{**kwargs, "config": config})

    slot_submodules = copy.copy(submodules)
    slot_submodules.experts = build_experts
    slot_submodules.router = with_true_config(submodules.router)
    if submodules.shared_experts is not None:
        slot_submodules.shared_experts = with_true_config(submodules.shared_experts)
    return slot_submodules


def activation_builder(submodules: MoESubmodules) -> Any:
    options = getattr(submodules.experts, "keywords", {})
    return getattr(options.get("submodules"), "activation_func", None)
