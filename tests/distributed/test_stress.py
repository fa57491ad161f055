"""Random delays in every exchange and every plan change no bit.

A configuration starts once; each seed is two steps of its run. Every rank's weights and gradients
are compared after every step, so that a seed starts as in the undisturbed run.

Runs 5 seeds each day. The 200 are for a machine with time:

    scripts/test.sh --nightly -- tests/distributed/test_stress.py
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.distributed.conftest import Trainings
from tests.faults.delays import STEPS_PER_SEED, WATCHDOG_S, Trace, train_with_delays
from tests.parity.row import FSEP, HOMES
from tests.parity.rows import FULL_RECOMPUTE, STEP

VIRTUAL = (
    " --num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    " --expert-model-parallel-size 2"
)
FORECAST = " --fsep-plan-mode forecast"
NODES = " --fsep-node-size 2 --fsep-set restore_algorithm=node"
TOKENS = " --fsep-node-size 2 --fsep-token-exchange node"
# Below the imbalance of forecasts here, so that layouts also change between gate and experts.
ADAPTIVE = " --fsep-plan-mode adaptive --fsep-set imbalance_tolerance=0.02"


QUICK = "restored per layer"
# Ranks, global batch, and flags.
CASES = {
    QUICK: (2, 4, FORECAST + " --num-layers 3"),
    "experts and tokens by nodes, 2 of 2": (4, 8, FORECAST + NODES + TOKENS),
    "restored per step, accumulation 4": (2, 8, STEP + " --num-layers 3"),
    "pipeline 2 x virtual 2": (4, 8, FORECAST + VIRTUAL),
    "full recompute, adaptive": (2, 4, ADAPTIVE + FULL_RECOMPUTE + " --num-layers 3"),
    "experts at home by relay, adaptive": (4, 8, ADAPTIVE + HOMES + NODES),
}


def reordered_seeds(disturbed: list[Trace], steady: list[Trace]) -> int:
    """Return seeds in which a rank saw exchanges complete in another order; all agree on them."""
    seeds = set()
    for mine, other in zip(disturbed, steady, strict=True):
        for step, pair in enumerate(zip(mine.completed, other.completed, strict=True)):
            assert Counter(pair[0]) == Counter(pair[1]), f"other exchanges in step {step}"
            if pair[0] != pair[1]:
                seeds.add(step // STEPS_PER_SEED)
    return len(seeds)


def differing_steps(disturbed: list[Trace], steady: list[Trace]) -> list[tuple[int, int]]:
    """Return (rank, step) wherever a bit of weights, gradients, loss or gradient norm differs."""
    found = []
    for rank, traces in enumerate(zip(disturbed, steady, strict=True)):
        mine, other = (
            zip(trace.digests, trace.record.losses, trace.record.grad_norms, strict=True)
            for trace in traces
        )
        steps = enumerate(zip(mine, other, strict=True))
        found += [(rank, step) for step, (ours, theirs) in steps if ours != theirs]
    return found


@pytest.mark.parametrize("seeds", [5, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "case",
    [pytest.param(QUICK, marks=pytest.mark.quick), *(case for case in CASES if case != QUICK)],
)
def test_delays_change_no_bit_of_a_run_that_waits_for_plans(
    trained: Trainings, case: str, seeds: int
) -> None:
    size, batch, flags = CASES[case]
    steady, disturbed = (
        trained.each(
            f"{FSEP} --micro-batch-size 1 --fsep-late-plan wait{flags}",
            first_seed,
            by=train_with_delays,
            size=size,
            timeout_s=WATCHDOG_S * seeds,
            expert_parallel=size,
            global_batch=batch,
            steps=seeds * STEPS_PER_SEED,
        )
        for first_seed in (None, 0)
    )
    assert disturbed[0].versions[-1] == seeds * STEPS_PER_SEED - 1, "a plan for every step"
    assert len(disturbed[0].digests) == seeds * STEPS_PER_SEED
    assert differing_steps(disturbed, steady) == []
    if ADAPTIVE in flags:
        changes = [name for step in steady[0].completed for name in step if "change" in name]
        assert changes, "no layout was changed between gate and experts"
    reordered = reordered_seeds(disturbed, steady)
    slept = sum(trace.slept for trace in disturbed)
    print(f"\n{case}, wait: {seeds} seeds, {slept} delays, {reordered} seeds reordered completions")
    assert reordered > 0
