"""The communication schedule changes when things happen, and no bit of the result."""

from __future__ import annotations

from collections.abc import Callable

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
