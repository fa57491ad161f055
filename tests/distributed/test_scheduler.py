"""The communication schedule changes the order of events, and no bit of the result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.training import train
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.row import FSEP
from tests.parity.rows import DIST_OPT, EXACT, FULL_RECOMPUTE, MOE_RECOMPUTE, RANDOM, STEP
from tests.probes import watching

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
    "experts and tokens through nodes of 2, selective recompute": (
        4,
        " --num-layers 3" + MOE_RECOMPUTE + NODES + TOKENS,
    ),
    "restored once per step, virtual pipeline 2 x 2": (4, " --num-layers 4" + VIRTUAL + STEP),
}


def flags_of(extra: str) -> str:
    planner = "" if EXACT in extra or ADAPTIVE in extra else RANDOM
    return FSEP + planner + extra


@pytest.mark.parametrize("case", CASES)
def test_the_schedule_changes_no_bit(trained: Trainings, case: str) -> None:
    size, extra = CASES[case]
    batch = 8 * size // (2 if "pipeline" in case else 1)
    flags = f"{flags_of(extra)} --eval-interval 2 --eval-iters 1 --fsep-set scheduler="
    on, off = (
        trained(flags + scheduler, size=size, global_batch=batch, steps=STEPS)
        for scheduler in ("on", "off")
    )
    assert len(on.losses) == STEPS
    assert identical(on, off)


def order_of_events(flags: list[str]) -> list[str]:
    """Return the starts, departures and arrivals of the first microbatch on this rank, in order.

    Marks between them, for layer N: `attends N` ends its attention's forward, `tokens N` its
    dispatch. `experts N` begins its experts' compute, and `back N` is the return of its tokens'
    gradients. `attention N` ends its attention's backward. Where tokens go through nodes, `tokens
    N` ends the stage between nodes, and `inside N` starts the one inside. `embedding` ends the
    embedding's forward, and `head` the output layer's backward.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_laer.layer.dispatch.node_dispatcher import NodeTokenDispatcher
    from megatron_laer.runtime.weights.restored import RestoredExperts
    from megatron_laer.runtime.weights.slots import RestoredWeights, SlotGrads

    events: list[str] = []

    def happens(event: str) -> Callable[..., None]:
        return lambda *_: events.append(event)

    def before_head(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].register_hook(happens("head"))

    def hook(chunk: Any) -> None:
        chunk.embedding.register_forward_hook(happens("embedding"))
        for layer in chunk.decoder.layers:
            attention = layer.self_attention
            attention.register_forward_hook(happens(f"attends {layer.layer_number}"))
            attention.register_full_backward_hook(happens(f"attention {layer.layer_number}"))
        chunk.output_layer.register_forward_pre_hook(before_head)

    dispatch = MoELayer.dispatch

    def dispatched(self: Any, tokens: torch.Tensor, *args: Any) -> Any:
        if tokens.requires_grad:
            tokens.register_hook(happens(f"back {self.layer_number}"))
        result = dispatch(self, tokens, *args)
        events.append(f"tokens {self.layer_number}")
        return result

    def note(word: str) -> Callable[..., None]:
        return lambda of, *_: events.append(f"{word} {of.name.split()[1]}")

    def restore(weights: RestoredWeights) -> None:
        if not weights.are_here:
            note("restore")(weights)

    def pass_on(dispatcher: NodeTokenDispatcher, *_: Any) -> None:
        events.append(f"inside {dispatcher._current.layer_name.split()[1]}")

    def compute(restored: RestoredExperts, *_: Any) -> None:
        note("experts")(restored.weights)

    with (
        mock.patch.object(MoELayer, "dispatch", dispatched),
        watching(
            (NodeTokenDispatcher, "dispatch_postprocess", pass_on),
            (RestoredExperts, "before_compute", compute),
            (RestoredWeights, "start_restore", restore),
            (SlotGrads, "start_reduce", note("leave")),
            (SlotGrads, "finish_reduce", note("arrive")),
        ),
    ):
        train(flags, adapt=hook)
    return events


# A layer's restore starts before its attention, at the dispatch of the previous layer; the first
# layer's starts before any compute of the chunk.
FORWARD = (
    "restore 1, embedding, attends 1, tokens 1, restore 2, experts 1, "
    "attends 2, tokens 2, restore 3, experts 2, attends 3, tokens 3, experts 3, "
)
BACKWARD = (
    "restore 3, head, restore 2, back 3, leave 3, attention 3, "
    "restore 1, arrive 3, back 2, leave 2, attention 2, "
    "arrive 2, back 1, leave 1, attention 1, arrive 1"
)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "",
            # The last layer's experts come before the output layer's backward. A layer's gradients
            # leave after its tokens' and arrive at the end of the experts' backward of the previous
            # layer.
            FORWARD + BACKWARD,
        ),
        (
            TOKENS,
            # Restores start when tokens crossed nodes, and before they are passed on.
            re.sub(r"experts (\d),", r"inside \1, experts \1,", FORWARD) + BACKWARD,
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
            "attends 3, restore 3, tokens 3, experts 3, " + BACKWARD,
        ),
    ],
    ids=["plain", "tokens through nodes", "full recompute", "selective recompute", "exact"],
)
def test_exchanges_start_early_and_arrive_late(
    trained: Trainings, extra: str, expected: str
) -> None:
    flags = flags_of(f" --num-layers 3{extra}")
    size = 4 if TOKENS in extra else 2
    options = {"size": size, "global_batch": 2 * size, "steps": 1}
    for events in trained.each(flags, by=order_of_events, **options):
        assert ", ".join(events) == expected
