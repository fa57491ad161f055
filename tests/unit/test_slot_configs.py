"""Who pads tokens for fp8: the experts of a slot, and no dispatcher; and which layers copy them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from megatron_laer.layer import slot_configs
from megatron_laer.layer.moe_layer import FSEPMoELayer

BACK_ENDS = [("alltoall", None), ("flex", "deepep"), ("flex", "hybridep")]


def config(dispatcher: str, back_end: str | None, **more: Any) -> Any:
    values: dict[str, Any] = {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp4": None,
        "use_transformer_engine_op_fuser": False,
        "moe_router_padding_for_quantization": False,
        "num_moe_experts": 8,
    }
    dispatch = {"moe_token_dispatcher_type": dispatcher, "moe_flex_dispatcher_backend": back_end}
    return SimpleNamespace(**values | dispatch | more)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("by_router", [False, True])
def test_slots_pad_their_own_tokens(back_end: tuple[str, str | None], by_router: bool) -> None:
    given = config(*back_end, moe_router_padding_for_quantization=by_router)
    stock = moe_utils.skip_routed_expert_padding(given)
    assert stock == (by_router or back_end == BACK_ENDS[2])
    homes = slot_configs.of_home_experts(given)
    assert not moe_utils.skip_routed_expert_padding(homes)
    assert moe_utils.get_align_size_for_quantization(homes) == 16
    dispatch = slot_configs.of_dispatch(given, 12)
    assert moe_utils.get_align_size_for_quantization(dispatch) == 0
    assert (dispatch.moe_router_padding_for_quantization, dispatch.num_moe_experts) == (False, 12)
    assert (dispatch.moe_token_dispatcher_type, dispatch.moe_flex_dispatcher_backend) == back_end
    assert given == config(*back_end, moe_router_padding_for_quantization=by_router)


def test_without_fp8_home_experts_have_the_models_config() -> None:
    given = config("alltoall", None, fp8=None)
    assert slot_configs.of_home_experts(given) is given


@pytest.mark.parametrize(
    ("fp8", "in_parts", "number", "copies"),
    [
        ("e4m3", True, 1, True),  # in bf16, as the first layer of the model
        ("e4m3", True, 2, False),  # experts in fp8 save what they quantised
        ("e4m3", False, 1, False),
        (None, True, 1, False),
    ],
)
def test_layers_in_bf16_keep_tokens_that_megatrons_combined_schedule_frees(
    fp8: str | None, in_parts: bool, number: int, copies: bool
) -> None:
    """It frees arrived tokens in models in fp8, and layers at their ends may be in bf16."""
    layer: Any = mock.MagicMock()
    layer.config = SimpleNamespace(
        fp8=fp8,
        overlap_moe_expert_parallel_comm=in_parts,
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=0,
        num_layers=2,
        mtp_use_repeated_layer=False,
    )
    layer._is_mtp = False
    layer._coordinator.geometry.home_slots = 0
    layer._coordinator.config.quantises_experts = fp8 is not None
    FSEPMoELayer._register(layer, number)
    arrived_TH = torch.ones(2, 3)
    layer.token_dispatcher.dispatch_postprocess = lambda tokens, probs: (tokens, None, probs)
    FSEPMoELayer.routed_experts_compute(layer, arrived_TH, torch.ones(2))
    (input_TH, *_), _ = layer._slot_experts.call_args
    assert torch.equal(input_TH, arrived_TH)
    assert (input_TH.data_ptr() != arrived_TH.data_ptr()) == copies
