"""Replay of a recorded run with the forecast, planner and guard of training.

`walk` gives each layer's steps with forecasts, of which `LayerPolicy` plans layouts. The guard's
decision on them is an `Outcome` as in training, and `planner.outcome` has its price.

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.files import memory
from megatron_laer.planner.forecast import WINDOW, SmoothedForecast
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.strategies import Strategy
from megatron_laer.planner.traffic import Traffic
from megatron_laer.tools.traces.records import Trace

# Measured bytes per count [N, E] of a forecast, and of the current case.
_FORECAST_BYTES, _WORKING_BYTES = 16, 170


class LayerStep(NamedTuple):
    """Records of one layer in one step of a trace."""

    step: int
    layer: int
    records: range


def layer_steps(trace: Trace) -> Iterator[LayerStep]:
    """Yield the steps of all layers, in the order of the trace."""
    is_new_R = (np.diff(trace.step_R) != 0) | (np.diff(trace.layer_R) != 0)
    bounds = [0, *(np.flatnonzero(is_new_R) + 1).tolist(), len(trace)]
    for first, end in pairwise(bounds):
        yield LayerStep(int(trace.step_R[first]), int(trace.layer_R[first]), range(first, end))


class Observed(NamedTuple):
    """Forecast of a layer, and records of its newest microbatches, which the paper's planner sums.

    `total_NE` sums the counts of records.
    """

    forecast: SmoothedForecast
    newest: tuple[int, ...]
    total_NE: Callable[[Sequence[int]], Int64]


def walk(
    trace: Trace,
    total_NE: Callable[[Sequence[int]], Int64] | None = None,
    microbatches: int | None = None,
) -> Iterator[tuple[LayerStep, Observed | None]]:
    """Yield the steps of all layers with their forecasts, None in a layer's first step.

    `total_NE` is by default the trace's. A step's `microbatches` take its records in turn; each has
    its own by default.
    """
    total_NE = total_NE or trace.total_NE
    states: dict[int, Observed] = {}
    for of in layer_steps(trace):
        yield of, states.get(of.layer)
        before = states.get(of.layer) or Observed(SmoothedForecast(), (), total_NE)
        last = range(microbatches or len(of.records))[-WINDOW:]
        newest = (*before.newest, *(of.records[number % len(of.records)] for number in last))
        forecast = before.forecast.observe(total_NE(of.records))
        states[of.layer] = Observed(forecast, newest[-WINDOW:], total_NE)


def check_memory(trace: Trace, num_ranks: int, *, record_bytes: int, purpose: str) -> None:
    """Refuse a replay that would take more memory than is free.

    `record_bytes` are of all records, per count [N, E].
    """
    forecasts = 2 * len(trace.layers)  # the newest, and the one before
    per_count = record_bytes + _FORECAST_BYTES * forecasts + _WORKING_BYTES
    needed = num_ranks * trace.num_experts * per_count
    share = memory.available_bytes() / needed
    memory.check_enough(needed, purpose, f"give --ranks of at most {int(num_ranks * share):,}")


@dataclass
class LayerPolicy:
    """Layout of one layer, planned anew for each step by a strategy, or kept without one.

    `by_newest` strategies take the sum of the newest microbatches in place of the forecast.
    """

    strategy: Strategy | None
    layout: ExpertLayout
    by_newest: bool = False

    def plan(self, observed: Observed) -> ExpertLayout:
        if self.strategy is not None:
            counts_NE = observed.forecast.counts_NE()
            if self.by_newest:
                counts_NE = observed.total_NE(observed.newest)
            self.layout = self.strategy.plan(counts_NE, self.layout)
        return self.layout


def changed_traffic(guard: Guard, decision: Decision) -> Traffic:
    """Return the traffic of the slots that a layout made after the gate changes."""
    chosen = Placed(decision.layout, guard.geometry)
    changed_S = chosen.changed_S(Placed(decision.planned_layout, guard.geometry))
    return guard.costs.restore_bytes(chosen, guard.costs.way_of(chosen), changed_S)


def busiest_rank(traffic: Traffic) -> int:
    """Return the most bytes that one rank receives, over both link classes."""
    return int((traffic.intra_N + traffic.inter_N).max())


# Records of one step by layer.
LayerRecords = Mapping[int, Sequence[int]]
# These and the layers' forecasts.
Step = tuple[LayerRecords, Mapping[int, Observed]]


class Routing:
    """Counts of a run with other ranks, or other `tokens` of a rank, than its trace.

    `pairs` are the mean (token, expert) pairs of a rank and microbatch. Raises ValueError for a
    trace without tokens, and for more ranks than memory holds.
    """

    def __init__(self, trace: Trace, num_ranks: int, topk: int, tokens: int | None = None) -> None:
        purpose = f"simulating {num_ranks:,} ranks"
        check_memory(trace, num_ranks, record_bytes=0, purpose=purpose)
        trace.check_divides(num_ranks)
        self._trace = trace
        self.num_ranks = num_ranks
        self.layers = len(trace.layers)
        self.microbatches = int(trace.microbatch_R.max()) + 1
        total = float(trace.counts_RNE.sum(dtype=np.float64)) / len(trace)
        if total == 0:
            raise ValueError("the trace holds no tokens; record a run that routes some")
        recorded = total / num_ranks
        self._factor = 1.0 if tokens is None else tokens * topk / recorded
        self.pairs = recorded * self._factor

    def tokens(self, topk: int) -> int:
        """Return the mean tokens of a rank and microbatch."""
        return max(round(self.pairs / topk), 1)

    def counts_NE(self, record: int) -> Int64:
        """Return the counts of one record, int64 [N, E]."""
        alone = self._trace.part(slice(record, record + 1))
        counts_NE = alone.with_ranks(self.num_ranks).counts_NE(0)
        if self._factor == 1.0:
            return counts_NE
        # Round cumulative sums, so that a rank's total is off by less than one token.
        ends_NE = np.floor(np.cumsum(counts_NE, axis=1) * self._factor + 0.5).astype(np.int64)
        return np.diff(ends_NE, axis=1, prepend=0)

    def walk(self, chosen: int, microbatches: int = 1) -> Iterator[Step]:
        """Yield `chosen` steps, spread over the trace, with each layer's forecast at that time.

        Steps without a forecast, or without all layers as where a recording started or stopped in
        them, are never chosen. A step has `microbatches`, which take its records in turn.
        """
        steps = {
            number: {layer: records for _, layer, records in of_step}
            for number, of_step in groupby(layer_steps(self._trace), key=itemgetter(0))
        }
        after, began = list[int](), set[int]()  # steps whose layers all have a forecast
        for number, of_layers in steps.items():
            if len(of_layers) == self.layers == len(began):
                after.append(number)
            began |= of_layers.keys()
        if not after:
            raise ValueError(
                f"the trace holds {len(steps)} step(s), and a forecast takes an earlier one; "
                f"record at least 2 that have all of its {self.layers} layers"
            )
        picked = np.unique(np.linspace(0, len(after) - 1, min(chosen, len(after))).round())
        wanted = [after[int(place)] for place in picked]
        forecasts: dict[int, Observed] = {}
        for of, observed in walk(self._trace, self._total_NE, microbatches):
            if of.step == wanted[0]:
                assert observed is not None
                forecasts[of.layer] = observed
                if len(forecasts) == self.layers:
                    yield steps[wanted.pop(0)], forecasts
                    forecasts = {}
            if not wanted:
                return

    def _total_NE(self, records: Sequence[int]) -> Int64:
        total_NE = sum(self.counts_NE(record) for record in records)
        assert not isinstance(total_NE, int)
        return total_NE
