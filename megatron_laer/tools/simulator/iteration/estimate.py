"""This file estimates roughly, before any work, how long a simulation takes and how much memory.

Legend: N ranks, E experts, C slots per rank, L layers of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_laer.config import PlanMode
from megatron_laer.files import memory
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.strategies import TimeTerms, plan_time
from megatron_laer.tools.simulator.estimate import DRAWN, EVEN_GATE, FORECAST_GATE, FRESH_GATE
from megatron_laer.tools.simulator.iteration.methods import FLEXMOE, FSEP, LAER

# Processor times, measured on one core of an AMD EPYC at up to 4096 ranks, and rounded up: a
# microbatch's forward and backward through a layer, with one set of rates; what a pipeline adds for
# a chunk; a microbatch under stock's placement, a plan of FlexMoE's, and counts that are dealt out.
_LAYER_S, _LAYER_RANK_S = 1e-4, 3e-8
_CHUNK_S, _CHUNK_RANK_S = 2e-5, 2e-8
_GROUPED_GATE = TimeTerms(2e-4, 0.0, 1e-8)
_FLEXMOE_PLAN = TimeTerms(2e-3, 2e-5, 2e-7)
_DEALT_OUT = TimeTerms(1e-4, 0.0, 2e-8)

# Bytes: while one microbatch is worked out, per count; of a forecast, per count; of its work and of
# its times in a layer, both always and per rank; of a stage's clocks, per rank; of an operation in
# a stage's order; of a layer's bars in a timeline.
_WORKING_BYTES, _FORECAST_BYTES = 170, 16
_WORK_BYTES, _WORK_RANK_BYTES = 800, 40
_TIMES_BYTES, _TIMES_RANK_BYTES = 1500, 32
_CLOCK_BYTES, _OPERATION_BYTES = 256, 128
_BARS_BYTES = 40_000


@dataclass(frozen=True)
class Work:
    """Holds what the simulation of one case has to go through.

    Attributes:
        methods: by name, of which FSEP has this strategy and mode.
        rates: sets of constants.
        layers: L; `traced_layers` of the trace.
        microbatches, stages, chunks: of the run.
        steps: that are simulated.
        records: of the trace: microbatches of a layer.
        cases: of them those that are worked out, in a step of all layers.
        lag: age of a forecast.
        draws: whether the trace is a workload's, which is drawn.
        timeline: whether one is kept.
    """

    geometry: Geometry
    methods: Sequence[str]
    strategy: str
    mode: PlanMode
    rates: int
    layers: int
    traced_layers: int
    microbatches: int
    stages: int
    chunks: int
    steps: int
    records: int
    cases: int
    lag: int
    draws: bool
    timeline: bool

    @property
    def seconds(self) -> float:
        """Return the processor time of the whole case."""
        geometry, ranks = self.geometry, self.geometry.num_ranks
        passes = self.layers * self.microbatches * (_LAYER_S + _LAYER_RANK_S * ranks)
        chunks = self.stages * self.chunks * self.microbatches
        passes += chunks * (_CHUNK_S + _CHUNK_RANK_S * ranks)
        total = len(self.methods) * self.rates * passes
        for method in self.methods:
            gate, plan = _GROUPED_GATE, TimeTerms(0.0, 0.0, 0.0)
            if method == FLEXMOE:
                gate, plan = EVEN_GATE, _FLEXMOE_PLAN
            elif method == LAER:
                gate, plan = EVEN_GATE, plan_time("laer")
            elif method == FSEP:
                gate = FORECAST_GATE if self.mode == PlanMode.FORECAST else FRESH_GATE
                plan = plan_time(self.strategy)
            total += self.cases * gate.seconds(geometry)
            total += self.traced_layers * plan.seconds(geometry)
        once = self.records * _DEALT_OUT.seconds(geometry)
        once += self.records * DRAWN.seconds(geometry) if self.draws else 0.0
        return self.steps * total + once

    @property
    def bytes(self) -> int:
        """Return the most memory that the case takes."""
        ranks = self.geometry.num_ranks
        known = _FORECAST_BYTES * self.traced_layers * (self.lag + 1)
        total = ranks * self.geometry.num_experts * (_WORKING_BYTES + known)
        works = len(self.methods) * self.cases
        total += works * (_WORK_BYTES + _WORK_RANK_BYTES * ranks)
        of_layer = min(self.microbatches, -(-self.cases // self.traced_layers))
        total += self.layers * of_layer * (_TIMES_BYTES + _TIMES_RANK_BYTES * ranks)
        total += self.stages * (_CLOCK_BYTES + 8 * self.stages * self.chunks) * ranks
        total += 2 * self.stages * self.chunks * self.microbatches * _OPERATION_BYTES
        if self.timeline:
            total += len(self.methods) * self.layers * self.microbatches * _BARS_BYTES
        return total


def check_fits(works: Sequence[Work], longest_hours: float) -> None:
    """Refuse cases that would take longer in all, or of which one takes more memory than is free.

    Raises:
        ValueError: with the estimate, and with what to give less of.
    """
    largest = max(works, key=lambda work: work.bytes)
    memory.check_enough(
        largest.bytes,
        f"{largest.microbatches} microbatches on {largest.stages} stages of "
        f"{largest.geometry.num_ranks} ranks",
        "give fewer --microbatches, --ranks or --pipeline stages",
    )
    hours = sum(work.seconds for work in works) / 3600
    if hours > longest_hours:
        ranks = max(work.geometry.num_ranks for work in works)
        microbatches = max(work.microbatches for work in works)
        raise ValueError(
            f"simulating {len(works)} case(s) of up to {ranks:,} ranks and {microbatches:,} "
            f"microbatches would take about {hours:.2g} hours, more than the {longest_hours:.2g} "
            "of --hours; give fewer --ranks, --microbatches, --steps or --method, or "
            f"--hours {hours * 1.1:.2g}"
        )
