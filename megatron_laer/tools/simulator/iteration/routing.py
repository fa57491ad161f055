"""Counts of every step, layer and microbatch of a run, made from a trace one at a time.

The run may have other numbers of ranks and tokens than its trace. Counts are not kept, since those
of a large run would not fit into memory.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.tools.simulator.replay import (
    Observed,
    check_memory,
    kept_forecasts,
    layer_steps,
    walk,
)
from megatron_laer.tools.traces.records import Trace

# Records of one step by layer.
LayerRecords = Mapping[int, Sequence[int]]
# These and the layers' forecasts.
Step = tuple[LayerRecords, Mapping[int, Observed]]


class Routing:
    """Counts of a run with other ranks, or other `pairs` per microbatch, than its trace.

    `pairs` are the mean (token, expert) pairs of a rank. With `keeps_steps` those that were walked
    stay, for many methods.
    """

    def __init__(
        self,
        trace: Trace,
        num_ranks: int,
        pairs: float | None = None,
        *,
        keeps_steps: bool = False,
    ) -> None:
        trace.check_divides(num_ranks)
        self._trace = trace
        self.num_ranks, self.num_experts = num_ranks, trace.num_experts
        self.layers = len(trace.layers)
        total = float(trace.counts_RNE.sum(dtype=np.float64)) / len(trace)
        if total == 0:
            raise ValueError("the trace holds no tokens; record a run that routes some")
        self.recorded_pairs = total / num_ranks
        self._factor = 1.0 if pairs is None else pairs / self.recorded_pairs
        self._kept: dict[tuple[int, int], list[Step]] | None = {} if keeps_steps else None

    @classmethod
    def of_run(
        cls,
        trace: Trace,
        num_ranks: int,
        topk: int,
        tokens: int | None,
        lag: int,
        *,
        keeps_steps: bool = False,
    ) -> Routing:
        """Return the routing with these tokens of a rank, if given; refuse what no memory holds."""
        check_memory(
            num_ranks,
            trace.num_experts,
            record_bytes=0,
            forecasts=kept_forecasts(trace, lag),
            purpose=f"simulating {num_ranks:,} ranks",
        )
        pairs = None if tokens is None else float(tokens * topk)
        return cls(trace, num_ranks, pairs, keeps_steps=keeps_steps)

    @property
    def pairs(self) -> float:
        """Return the mean (token, expert) pairs of a rank and microbatch."""
        return self.recorded_pairs * self._factor

    def tokens(self, topk: int) -> int:
        """Return the mean tokens of a rank and microbatch."""
        return max(round(self.pairs / topk), 1)

    def steps(self) -> dict[int, LayerRecords]:
        """Return each step's records by layer."""
        return {
            number: {layer: records for _, layer, records in of_step}
            for number, of_step in groupby(layer_steps(self._trace), key=itemgetter(0))
        }

    def counts_NE(self, record: int) -> Int64:
        """Return the counts of one record, int64 [N, E]."""
        part = slice(record, record + 1)
        trace = self._trace
        alone = replace(
            trace,
            step_R=trace.step_R[part],
            layer_R=trace.layer_R[part],
            microbatch_R=trace.microbatch_R[part],
            counts_RNE=trace.counts_RNE[part],
        )
        counts_NE = alone.with_ranks(self.num_ranks).counts_NE(0)
        if self._factor == 1.0:
            return counts_NE
        # Round cumulative sums, so that a rank's total is off by less than one token.
        ends_NE = np.floor(np.cumsum(counts_NE, axis=1) * self._factor + 0.5).astype(np.int64)
        return np.diff(ends_NE, axis=1, prepend=0)

    def walk(self, lag: int, chosen: int, microbatches: int = 1) -> Iterable[Step]:
        """Return `chosen` steps, spread over the trace, with each layer's forecast at that time.

        The newest counts of a forecast are `lag` steps old; earlier steps have none. A step has
        `microbatches`, which take its records in turn.
        """
        if self._kept is None:
            return self._walk(lag, chosen, microbatches)
        if (lag, chosen) not in self._kept:  # FSEP's forecast is that of any number of microbatches
            self._kept[lag, chosen] = list(self._walk(lag, chosen, microbatches))
        return self._kept[lag, chosen]

    def _walk(self, lag: int, chosen: int, microbatches: int) -> Iterator[Step]:
        steps = self.steps()
        after = self._forecast_steps(steps, lag)
        if not after:
            raise ValueError(
                f"the trace holds {len(steps)} step(s), and a forecast is {lag} step(s) old; "
                f"record at least {lag + 1} that have all of its {self.layers} layers"
            )
        picked = np.unique(np.linspace(0, len(after) - 1, min(chosen, len(after))).round())
        wanted = [after[int(place)] for place in picked]
        forecasts: dict[int, Observed] = {}
        for of, observed in walk(self._trace, lag, self._total_NE, microbatches):
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

    def _forecast_steps(self, steps: Mapping[int, LayerRecords], lag: int) -> list[int]:
        """Return the steps that have all layers, each with a forecast of that age.

        A step lacks layers if the recording started or stopped in it.
        """
        found, before = [], [0] * self.layers
        for number, records in steps.items():
            if len(records) == self.layers and min(before) >= lag:
                found.append(number)
            for layer in records:
                before[layer] += 1
        return found
