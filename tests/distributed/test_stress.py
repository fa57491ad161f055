"""Random delays in every exchange and every plan change no bit.

A configuration starts once; each seed is two steps of its run. Every rank's weights and gradients
are compared after every step, so that a seed starts as in the undisturbed run.

Runs 5 seeds each day. The 200 are for a machine with time:

    scripts/test.sh --nightly -- tests/distributed/test_stress.py
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_laer.cpu.ranks import Raised, RankPools
from tests.faults.delays import STEPS_PER_SEED, Trace, train_with_delays
from tests.parity.flags import command_line
from tests.parity.row import HOMES
from tests.parity.rows import DIST_OPT, FULL_RECOMPUTE

VIRTUAL = " --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
FORECAST = " --fsep-plan-mode forecast"
NODES = " --fsep-node-size 2 --fsep-set restore_algorithm=node"
TOKENS = " --fsep-node-size 2 --fsep-token-exchange node"
# Below the imbalance of forecasts here, so that layouts also change between gate and experts.
ADAPTIVE = " --fsep-plan-mode adaptive --fsep-set imbalance_tolerance=0.02"


@dataclass(frozen=True)
class Case:
    """One configuration: ranks, size of the FSEP group, microbatches, layers and flags."""

    ranks: int
    group: int
    microbatches: int
    layers: int
    flags: str

    def command(self, data: str, seeds: int, extra: str) -> list[str]:
        replicas = self.ranks // (2 if VIRTUAL in self.flags else 1)
        return command_line(
            data,
            " --micro-batch-size 1 --expert-parallel-mode fsep --fsep-sharding rows"
            f" --num-layers {self.layers}{self.flags}{extra}",
            expert_parallel=self.group,
            global_batch=self.microbatches * replicas,
            steps=seeds * STEPS_PER_SEED,
        )


QUICK = "restored per layer"
CASES = {
    "restored per layer": Case(2, 2, 2, 3, FORECAST),
    "by nodes, 2 of 2": Case(4, 4, 2, 2, FORECAST + NODES),
    "tokens by nodes, 2 of 2": Case(4, 4, 2, 2, FORECAST + TOKENS),
    "experts and tokens by nodes, 2 of 2": Case(4, 4, 2, 2, FORECAST + NODES + TOKENS),
    "restored per step, accumulation 4": Case(2, 2, 4, 3, " --fsep-restore step"),
    "pipeline 2 x virtual 2": Case(4, 2, 4, 4, FORECAST + VIRTUAL),
    "full recompute": Case(2, 2, 2, 3, FORECAST + FULL_RECOMPUTE),
    "adaptive": Case(2, 2, 2, 3, ADAPTIVE),
    "full recompute, adaptive": Case(2, 2, 2, 3, ADAPTIVE + FULL_RECOMPUTE),
    "experts at home": Case(4, 2, 2, 3, FORECAST + HOMES + DIST_OPT),
    "experts at home by relay, adaptive": Case(4, 4, 2, 2, ADAPTIVE + HOMES + NODES),
}
# Together they have each part of the others.
DAILY = (
    QUICK,
    "experts and tokens by nodes, 2 of 2",
    "pipeline 2 x virtual 2",
    "full recompute, adaptive",
    "experts at home by relay, adaptive",
)
WAIT = " --fsep-late-plan wait"


def seeds_of_delays() -> Iterator[Any]:
    """Yield 5 seeds of some cases each day, one in the quick set too, and at night 200 of all."""
    for case in DAILY:
        yield pytest.param(case, 5, marks=pytest.mark.quick if case == QUICK else ())
    for case in CASES:
        yield pytest.param(case, 200, marks=pytest.mark.nightly)


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
    return [
        (rank, step)
        for rank, (mine, other) in enumerate(zip(disturbed, steady, strict=True))
        for step, (ours, theirs) in enumerate(zip(_results(mine), _results(other), strict=True))
        if ours != theirs
    ]


def _results(trace: Trace) -> list[tuple[str, float, float]]:
    record = trace.record
    return list(zip(trace.digests, record.losses, record.grad_norms, strict=True))


@pytest.mark.parametrize(("case", "seeds"), seeds_of_delays())
def test_delays_change_no_bit_of_a_run_that_waits_for_plans(
    ranks: RankPools, text_data: str, case: str, seeds: int
) -> None:
    pool, timeout_s = ranks(CASES[case].ranks), 60.0 + 31.0 * seeds
    command = CASES[case].command(text_data, seeds, WAIT)
    steady = pool.run(train_with_delays, command, None, timeout_s=timeout_s)
    disturbed = pool.run(train_with_delays, command, 0, timeout_s=timeout_s)
    assert disturbed[0].versions[-1] == seeds * STEPS_PER_SEED - 1, "a plan for every step"
    assert len(disturbed[0].digests) == seeds * STEPS_PER_SEED
    assert differing_steps(disturbed, steady) == []
    if ADAPTIVE in CASES[case].flags:
        changes = [name for step in steady[0].completed for name in step if "change" in name]
        assert changes, "no layout was changed between gate and experts"
    reordered = reordered_seeds(disturbed, steady)
    slept = sum(trace.slept for trace in disturbed)
    print(f"\n{case}, wait: {seeds} seeds, {slept} delays, {reordered} seeds reordered completions")
    assert reordered > 0


def train_without_waiting(flags: list[str], first_seed: int | None) -> Trace:
    """Let experts compute with a buffer that a restore is still filling."""
    from unittest import mock

    from megatron_laer.runtime.comm.streams import ThreadStream

    submit = ThreadStream.submit

    class Unawaited:
        def __init__(self, out: torch.Tensor) -> None:
            self._out = out

        def wait(self) -> torch.Tensor:
            return self._out

    def careless_submit(self: ThreadStream, work: Any, label: Any) -> Any:
        if label.kind != "restore":
            return submit(self, work, label)
        restore: Any = inspect.unwrap(work)  # as submitted, without the observation
        (steps,) = restore.args
        out = steps.gi_frame.f_locals["out"]
        submit(self, work, label)
        return Unawaited(out)

    with mock.patch.object(ThreadStream, "submit", careless_submit):
        return train_with_delays(flags, first_seed)


def test_a_restore_that_is_not_waited_for_is_found(ranks: RankPools, text_data: str) -> None:
    """Control: delays reveal a missing wait."""
    command = CASES["restored per layer"].command(text_data, 10, WAIT)
    steady = ranks(2).run(train_with_delays, command, None)
    careless = ranks(2).run_raw(train_without_waiting, command, 0)
    # Megatron may also find random bits, since its loss must be finite.
    assert any(isinstance(result, Raised) for result in careless) or differing_steps(
        careless, steady
    )
