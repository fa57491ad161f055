"""The communication schedule changes when things happen, and no bit of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.training import train
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

STEPS = 4
OVERLAP = " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FULL = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BLOCK = " --recompute-granularity full --recompute-method block --recompute-num-layers 2"
SELECTIVE = " --recompute-granularity selective --recompute-modules moe"
PIPELINE = " --pipeline-model-parallel-size 2"
VIRTUAL = PIPELINE + " --num-layers-per-virtual-pipeline-stage 1"

STEP = " --fsep-restore step"
EXACT = " --fsep-plan-mode exact"

# Ranks and flags; 3 layers where not said otherwise, 4 microbatches of 2 sequences per rank.
CASES = {
    "plain": (2, " --num-layers 3"),
    "full recompute": (2, " --num-layers 3" + FULL),
    "recompute of the first layers": (2, " --num-layers 3" + BLOCK),
    "selective recompute": (2, " --num-layers 3" + SELECTIVE),
    "expert data parallel 2, overlaps": (4, " --num-layers 3" + OVERLAP),
    "pipeline 2": (4, " --num-layers 4" + PIPELINE),
    "virtual pipeline 2 x 2": (4, " --num-layers 4" + VIRTUAL),
    "exact": (2, " --num-layers 3" + EXACT),
    "restored once per step, full recompute": (2, " --num-layers 3" + FULL + STEP),
    "restored once per step, overlaps": (4, " --num-layers 3" + OVERLAP + STEP),
    "restored once per step, virtual pipeline 2 x 2": (4, " --num-layers 4" + VIRTUAL + STEP),
    "virtual pipeline 2 x 2, full recompute": (4, " --num-layers 4" + VIRTUAL + FULL),
}


@pytest.mark.parametrize("case", CASES)
def test_the_schedule_changes_no_bit(
    ranks: Callable[[int], RankPool], text_data: str, case: str
) -> None:
    size, extra = CASES[case]
    planner = "" if EXACT in extra else " --fsep-planner random"
    pipelines = 2 if "pipeline" in case else 1
    on, off = (
        ranks(size).run(
            train,
            command_line(
                text_data,
                experts=8,
                expert_parallel=2,
                global_batch=8 * size // pipelines,
                steps=STEPS,
                extra=f" --expert-parallel-mode fsep{planner}{extra}"
                f" --fsep-scheduler {scheduler} --eval-interval 2 --eval-iters 1",
            ),
        )[0]
        for scheduler in ("on", "off")
    )
    assert len(on.losses) == STEPS
    assert identical(on, off)


def order_of_events(command: list[str]) -> list[str]:
    """What starts, leaves and arrives on this rank in the first microbatch, in program order.

    `attention N` is the end of the backward pass of layer N's attention.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_laer.runtime.restored import RestoredExperts

    events: list[str] = []

    def told(word: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            if word != "restore" or self._matrices is None:
                events.append(f"{word} {self._name.split()[1]}")
            return method(self, *args)

        return call

    init = TransformerLayer.__init__

    def hooked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.self_attention.register_full_backward_hook(
            lambda *_: events.append(f"attention {self.layer_number}")
        )

    with (
        mock.patch.object(TransformerLayer, "__init__", hooked),
        mock.patch.object(RestoredExperts, "start", told("restore", RestoredExperts.start)),
        mock.patch.object(RestoredExperts, "reduce", told("leave", RestoredExperts.reduce)),
        mock.patch.object(RestoredExperts, "reduced", told("arrive", RestoredExperts.reduced)),
    ):
        train(command)
    return events


FORWARD = ["restore 1", "restore 2", "restore 3"]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "",
            # Gradients of a layer arrive under the experts' backward of the layer before.
            "restore 3, restore 2, leave 3, attention 3, "
            "restore 1, leave 2, arrive 3, attention 2, "
            "leave 1, arrive 2, attention 1, arrive 1",
        ),
        (
            FULL,
            # Each layer's backward is one of its own: they arrive when its attention is done.
            "restore 3, restore 2, leave 3, attention 3, arrive 3, "
            "restore 1, leave 2, attention 2, arrive 2, "
            "leave 1, attention 1, arrive 1",
        ),
        (
            SELECTIVE,
            "restore 3, restore 2, leave 3, attention 3, arrive 3, "
            "restore 1, leave 2, attention 2, arrive 2, "
            "leave 1, attention 1, arrive 1",
        ),
    ],
    ids=["plain", "full recompute", "selective recompute"],
)
def test_exchanges_start_early_and_arrive_late(
    ranks: Callable[[int], RankPool], text_data: str, extra: str, expected: str
) -> None:
    command = command_line(
        text_data,
        experts=8,
        expert_parallel=2,
        global_batch=4,
        steps=1,
        extra=f" --expert-parallel-mode fsep --fsep-planner random --num-layers 3{extra}",
    )
    for events in ranks(2).run(order_of_events, command):
        assert events == FORWARD + expected.split(", ")
