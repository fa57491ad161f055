"""Copies of Megatron's TransformerConfig for parts of a MoE layer that FSEP configures.

Copies are shallow on purpose: `dataclasses.replace` would validate again.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.fp8_utils import is_first_last_bf16_layer

from megatron_laer.config import FSEPConfig


def of_dispatch(config: Any, num_slots: int) -> Any:
    """Return the config of Megatron's part behind the router, whose experts are S slots.

    It exchanges the plan's rows alone: multiples for fp8 would be broken by splits of an expert's
    tokens between slots. So each slot's tokens are padded where they are computed.
    """
    slots = copy.copy(config)
    slots.num_moe_experts = num_slots
    slots.fp8 = slots.fp4 = None
    slots.moe_router_padding_for_quantization = False
    return slots


def is_quantised(config: Any, given: FSEPConfig, layer_number: int, *, is_mtp: bool) -> bool:
    """Return whether a layer's experts compute in fp8; a model's ends may be kept in bf16."""
    kept_out = not is_mtp and is_first_last_bf16_layer(config, layer_number - 1)
    return given.quantises_experts and not kept_out


def of_home_experts(config: Any) -> Any:
    """Return the config with which stock's experts pad tokens for fp8 themselves."""
    if not config.fp8:
        return config
    padding = copy.copy(config)
    padding.moe_router_padding_for_quantization = False
    # With HybridEP they would take padded ones. Experts read no more of the dispatcher than that.
    padding.moe_token_dispatcher_type = "alltoall"
    return padding
