"""Who pads tokens for fp8: the experts of a slot, and no dispatcher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.moe import moe_utils

from megatron_laer.layer import slot_configs

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
