"""Megatron-Bridge's mapping code converts weights of an FSEP model as it does those of stock.

With experts at home it needs no context of ours.

Needs a checkout of Megatron-Bridge 0.6 in the folder MEGATRON_BRIDGE_CHECKOUT, and its
dependencies, which the pages on it name.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from megatron_laer import session
from megatron_laer.cpu.ranks import RankPools
from tests.bridge_stubs import importable
from tests.checkouts import checkout
from tests.distributed.test_stock_loading import probed
from tests.parity.flags import command_line

CHECKOUT, pytestmark = checkout("MEGATRON_BRIDGE_CHECKOUT", "Megatron-Bridge 0.6")

FSEP = " --expert-parallel-mode fsep --fsep-planner random --fsep-sharding rows"
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


def converted(flags: list[str], shown: bool) -> list[dict[str, torch.Tensor]]:
    """Return the weights in Hugging Face's format, and after a load of the doubled ones.

    The last entry has the doubled ones again, by tasks that were kept from before the load. With
    `shown`, our context shows experts to Megatron-Bridge as stock's.
    """

    def convert(model: list[torch.nn.Module]) -> list[dict[str, torch.Tensor]]:
        from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge
        from transformers import Qwen3MoeConfig

        from megatron_laer.integrations.bridge_weights import stock_weights

        config = Qwen3MoeConfig(num_experts=4, hidden_size=48, num_attention_heads=4)

        def exported(tasks: Any = None) -> dict[str, torch.Tensor]:
            stream = Qwen3MoEBridge().stream_weights_megatron_to_hf(
                model, config, show_progress=False, conversion_tasks=tasks
            )
            return {name: weight.clone() for name, weight in stream}

        with stock_weights() if shown else contextlib.nullcontext():
            before = exported()
            kept = Qwen3MoEBridge().build_conversion_tasks(config, model)
            doubled = {name: 2 * weight for name, weight in before.items()}
            Qwen3MoEBridge().load_weights_hf_to_megatron(Pretrained(config, doubled), model)
            after = exported()
        again = exported(kept)
        fsep = session.current()
        if shown and fsep is not None and torch.distributed.get_world_size() == 2:
            # Pipeline stages would wait for each other.
            listed = list(kept)  # as NeMo-RL keeps them, so that experts are copies of this moment
            exported(listed)
            fsep.end_step(weights_changed=True)
            with pytest.raises(RuntimeError, match="keep no list from one step to another"):
                exported(listed)
        return [before, after, again]

    with importable(CHECKOUT):
        return probed(flags, convert)


@pytest.mark.parametrize(
    ("size", "extra"),
    [(2, ""), (4, " --pipeline-model-parallel-size 2")],
    ids=["2 ranks", "2 pipeline stages"],
)
def test_qwen3_moe_is_converted_as_stocks_and_back(
    ranks: RankPools, text_data: str, size: int, extra: str
) -> None:
    def run(mode: str, *, shown: bool) -> Any:
        flags = command_line(text_data, QWEN3 + extra + mode, experts=4, steps=1)
        return ranks(size).run(converted, flags, shown)

    stock = run("", shown=False)
    of_ranks = [*run(FSEP, shown=True), *run(HOMES, shown=False)]
    for rank, (theirs, ours) in enumerate(zip(2 * stock, of_ranks, strict=True)):
        for expected, found in zip(theirs, ours, strict=True):
            assert found.keys() == expected.keys(), rank
            for name, weight in expected.items():
                assert torch.equal(found[name], weight), (rank, name)
        before, after, again = ours
        assert {
            EXPERT.format(layer, expert, part): shape
            for layer in range(2)
            for expert in range(4)
            for part, shape in PARTS.items()
        } == {name: list(weight.shape) for name, weight in before.items() if ".experts." in name}
        for name, weight in before.items():
            assert torch.equal(after[name], 2 * weight), (rank, name)
            assert torch.equal(again[name], 2 * weight), (rank, name)
