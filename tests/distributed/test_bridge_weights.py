"""Megatron-Bridge's mapping code converts experts at home as it does those of stock.

Needs a checkout of Megatron-Bridge 0.6 in the folder MEGATRON_BRIDGE_CHECKOUT, and its
dependencies, which the pages on it name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_laer.cpu.training import train
from tests.bridge_stubs import importable
from tests.checkouts import checkout
from tests.checkpoints import assert_equal
from tests.distributed.conftest import Trainings

CHECKOUT, pytestmark = checkout("MEGATRON_BRIDGE_CHECKOUT", "Megatron-Bridge 0.6")

HOMES = " --expert-parallel-mode fsep --fsep-planner random --fsep-sharding experts"
QWEN3 = (
    " --lr 0 --min-lr 0 --group-query-attention --num-query-groups 2 --kv-channels 16"
    " --qk-layernorm"
)
EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
PARTS = {"gate": [64, 48], "up": [64, 48], "down": [48, 64]}


class Pretrained:
    """Model of Hugging Face's with these weights, as Megatron-Bridge sees it."""

    model_name_or_path = "weights of a test"

    def __init__(self, config: Any, weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self.state = _State(weights)


class _State(dict[str, torch.Tensor]):
    @property
    def source(self) -> Any:
        return self

    def get_all_keys(self) -> list[str]:
        return list(self)


def qwen3() -> tuple[Any, Any]:
    from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(num_experts=4, hidden_size=48, num_attention_heads=4)
    return Qwen3MoEBridge(), config


def exported(model: list[torch.nn.Module], **options: Any) -> dict[str, torch.Tensor]:
    """Return the weights in Hugging Face's format."""
    bridge, config = qwen3()
    stream = bridge.stream_weights_megatron_to_hf(model, config, show_progress=False, **options)
    return {name: weight.clone() for name, weight in stream}


def converted(flags: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return the weights in Hugging Face's format, and after a load of the doubled ones.

    The last entry has the doubled ones again, by tasks that were kept from before the load.
    """

    def convert(model: list[torch.nn.Module]) -> list[dict[str, torch.Tensor]]:
        bridge, config = qwen3()
        before = exported(model)
        kept = bridge.build_conversion_tasks(config, model)
        doubled = {name: 2 * weight for name, weight in before.items()}
        bridge.load_weights_hf_to_megatron(Pretrained(config, doubled), model)
        return [before, exported(model), exported(model, conversion_tasks=kept)]

    with importable(CHECKOUT):
        found: list[dict[str, torch.Tensor]] = train(flags, convert).probes[0]
        return found


@pytest.mark.parametrize(
    ("size", "extra"),
    [(2, ""), (4, " --pipeline-model-parallel-size 2")],
    ids=["2 ranks", "2 pipeline stages"],
)
def test_qwen3_moe_is_converted_as_stocks_and_back(
    trained: Trainings, size: int, extra: str
) -> None:
    stock, homes = (
        trained.each(QWEN3 + extra + mode, by=converted, size=size, experts=4, steps=1)
        for mode in ("", HOMES)
    )
    for theirs, ours in zip(stock, homes, strict=True):
        for expected, found in zip(theirs, ours, strict=True):
            assert_equal(found, expected)
        before, after, again = ours
        assert {
            EXPERT.format(layer, expert, part): shape
            for layer in range(2)
            for expert in range(4)
            for part, shape in PARTS.items()
        } == {name: list(weight.shape) for name, weight in before.items() if ".experts." in name}
        for doubled in (after, again):
            assert_equal(doubled, {name: 2 * weight for name, weight in before.items()})
