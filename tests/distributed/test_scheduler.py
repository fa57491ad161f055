"""The communication schedule changes the order of events, and no bit of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.rows import DIST_OPT, EXACT, FULL_RECOMPUTE, MOE_RECOMPUTE, STEP

STEPS = 4
BLOCK = " --recompute-granularity full --recompute-method block --recompute-num-layers 2"
REPEATED = " --mtp-num-layers 3 --mtp-use-repeated-layer"
VIRTUAL = " --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
# Some microbatches keep the planned layout and some do not; a late plan would differ.
ADAPTIVE = " --fsep-set imbalance_tolerance=0.02 --fsep-late-plan wait"
NODES = " --expert-model-parallel-size 4 --fsep-node-size 2 --fsep-set restore_algorithm=node"
TOKENS = " --expert-model-parallel-size 4 --fsep-node-size 2 --fsep-token-exchange node"

# Ranks and flags; 4 microbatches of 2 sequences per rank. Together they have each part of the
# schedule.
CASES = {
    "recompute of the first layers, expert data parallel 2, overlaps": (
        4,
        " --num-layers 3" + BLOCK + DIST_OPT,
    ),
    "repeated MTP layer, full recompute, adaptive": (
        2,
        " --num-layers 1" + REPEATED + FULL_RECOMPUTE + ADAPTIVE,
    ),
    "exact": (2, " --num-layers 3" + EXACT),
    "experts and tokens through nodes of 2, selective recompute": (
        4,
        " --num-layers 3" + MOE_RECOMPUTE + NODES + TOKENS,
    ),
    "restored once per step, virtual pipeline 2 x 2": (4, " --num-layers 4" + VIRTUAL + STEP),
}


def command(data: str, batch: int, steps: int, extra: str) -> list[str]:
    planner = "" if EXACT in extra or ADAPTIVE in extra else " --fsep-planner random"
    return command_line(
        data,
        f" --expert-parallel-mode fsep --fsep-sharding rows{planner}{extra}",
        global_batch=batch,
        steps=steps,
    )


@pytest.mark.parametrize("case", CASES)
def test_the_schedule_changes_no_bit(ranks: RankPools, text_data: str, case: str) -> None:
    size, extra = CASES[case]
    batch = 8 * size // (2 if "pipeline" in case else 1)
    evaluation = " --eval-interval 2 --eval-iters 1"
    on, off = (
        ranks(size).run(train, command(text_data, batch, STEPS, extra + scheduler + evaluation))[0]
        for scheduler in (" --fsep-set scheduler=on", " --fsep-set scheduler=off")
    )
    assert len(on.losses) == STEPS
    assert identical(on, off)


def order_of_events(flags: list[str]) -> list[str]:
    """Return the starts, departures and arrivals of the first microbatch on this rank, in order.

    Marks between them, for layer N: `attends N` ends its attention's forward, `tokens N` its
    dispatch. `experts N` is the call of its experts, `back N` the return of its tokens' gradients.
    `attention N` ends its attention's backward. Where tokens go through nodes, `tokens N` ends the
    stage between nodes, and `inside N` starts the one inside. `embedding` starts the first forward;
    `head` ends the output layer's backward.
    """
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_laer.layer.dispatch.node_dispatcher import NodeTokenDispatcher
    from megatron_laer.layer.moe_layer import FSEPMoELayer
    from megatron_laer.runtime.weights.restored_weights import RestoredWeights
    from megatron_laer.runtime.weights.slot_grads import SlotGrads
    from megatron_laer.runtime.weights.states import WeightState

    events: list[str] = []

    def told(word: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            if word != "restore" or self.state.weights is WeightState.SHARDED:
                events.append(f"{word} {self._name.split()[1]}")
            return method(self, *args)

        return call

    layer_init, model_init = TransformerLayer.__init__, GPTModel.__init__
    embed, dispatch = LanguageModelEmbedding.forward, MoELayer.dispatch
    compute = FSEPMoELayer.routed_experts_compute
    pass_on = NodeTokenDispatcher.dispatch_postprocess

    def layer_hooked(self: Any, *args: Any, **kwargs: Any) -> None:
        layer_init(self, *args, **kwargs)
        self.self_attention.register_forward_hook(
            lambda *_: events.append(f"attends {self.layer_number}")
        )
        self.self_attention.register_full_backward_hook(
            lambda *_: events.append(f"attention {self.layer_number}")
        )

    def before_head(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].register_hook(lambda _: events.append("head"))

    def model_hooked(self: Any, *args: Any, **kwargs: Any) -> None:
        model_init(self, *args, **kwargs)
        self.output_layer.register_forward_pre_hook(before_head)

    def embedding(self: Any, *args: Any, **kwargs: Any) -> Any:
        events.append("embedding")
        return embed(self, *args, **kwargs)

    def dispatched(self: Any, tokens: torch.Tensor, *args: Any) -> Any:
        if tokens.requires_grad:
            tokens.register_hook(lambda _: events.append(f"back {self.layer_number}"))
        result = dispatch(self, tokens, *args)
        events.append(f"tokens {self.layer_number}")
        return result

    def experts(self: Any, *args: Any) -> Any:
        events.append(f"experts {self.layer_number}")
        return compute(self, *args)

    def passed_on(self: Any, *args: Any) -> Any:
        events.append(f"inside {self._current.layer_name.split()[1]}")
        return pass_on(self, *args)

    with (
        mock.patch.object(NodeTokenDispatcher, "dispatch_postprocess", passed_on),
        mock.patch.object(TransformerLayer, "__init__", layer_hooked),
        mock.patch.object(GPTModel, "__init__", model_hooked),
        mock.patch.object(LanguageModelEmbedding, "forward", embedding),
        mock.patch.object(MoELayer, "dispatch", dispatched),
        mock.patch.object(FSEPMoELayer, "routed_experts_compute", experts),
        mock.patch.object(
            RestoredWeights, "start_restore", told("restore", RestoredWeights.start_restore)
        ),
        mock.patch.multiple(
            SlotGrads,
            start_reduce=told("leave", SlotGrads.start_reduce),
            finish_reduce=told("arrive", SlotGrads.finish_reduce),
        ),
    ):
        train(flags)
    return events


# A layer's restore starts before its attention, at the dispatch of the previous layer; the first
# layer's starts before any compute of the chunk.
FORWARD = (
    "restore 1, embedding, attends 1, tokens 1, restore 2, experts 1, "
    "attends 2, tokens 2, restore 3, experts 2, attends 3, tokens 3, experts 3, "
)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "",
            # The last layer's experts come before the output layer's backward. A layer's gradients
            # leave after its tokens' and arrive at the end of the experts' backward of the previous
            # layer.
            FORWARD + "restore 3, head, restore 2, back 3, leave 3, attention 3, "
            "restore 1, arrive 3, back 2, leave 2, attention 2, "
            "arrive 2, back 1, leave 1, attention 1, arrive 1",
        ),
        (
            FULL_RECOMPUTE,
            # Each layer has a backward of its own: gradients arrive at the end of its attention.
            FORWARD + "restore 3, head, "
            "attends 3, tokens 3, experts 3, restore 2, back 3, leave 3, attention 3, arrive 3, "
            "attends 2, tokens 2, experts 2, restore 1, back 2, leave 2, attention 2, arrive 2, "
            "attends 1, tokens 1, experts 1, back 1, leave 1, attention 1, arrive 1",
        ),
        (
            MOE_RECOMPUTE,
            FORWARD + "restore 3, head, "
            # So has each MoE layer, without its attention.
            "tokens 3, experts 3, restore 2, back 3, leave 3, arrive 3, attention 3, "
            "tokens 2, experts 2, restore 1, back 2, leave 2, arrive 2, attention 2, "
            "tokens 1, experts 1, back 1, leave 1, arrive 1, attention 1",
        ),
        (
            EXACT,
            # The restored experts are known after the gate, where their restore starts.
            "embedding, attends 1, restore 1, tokens 1, experts 1, "
            "attends 2, restore 2, tokens 2, experts 2, "
            "attends 3, restore 3, tokens 3, experts 3, "
            "restore 3, head, restore 2, back 3, leave 3, attention 3, "
            "restore 1, arrive 3, back 2, leave 2, attention 2, "
            "arrive 2, back 1, leave 1, attention 1, arrive 1",
        ),
    ],
    ids=["plain", "full recompute", "selective recompute", "exact"],
)
def test_exchanges_start_early_and_arrive_late(
    ranks: RankPools, text_data: str, extra: str, expected: str
) -> None:
    flags = command(text_data, 4, 1, f" --num-layers 3{extra}")
    for events in ranks(2).run(order_of_events, flags):
        assert ", ".join(events) == expected


def test_restores_start_when_tokens_crossed_nodes_and_before_they_are_passed_on(
    ranks: RankPools, text_data: str
) -> None:
    flags = command(text_data, 8, 1, f" --num-layers 3{TOKENS}")
    passed_on = FORWARD
    for layer in "123":
        passed_on = passed_on.replace(f"experts {layer},", f"experts {layer}, inside {layer},")
    for events in ranks(4).run(order_of_events, flags):
        assert ", ".join(events).startswith(passed_on)
