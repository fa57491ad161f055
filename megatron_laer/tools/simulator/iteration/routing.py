"""Counts of every step, layer and microbatch of a run, made from a trace one at a time.

The run may have other numbers of ranks and tokens than its trace. Counts are not kept, since those
of a large run would not fit into memory.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.tools.simulator.replay import Observed, check_memory, layer_steps, walk
from megatron_laer.tools.traces.records import Trace

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
        self.num_ranks, self.num_experts = num_ranks, trace.num_experts
        self.layers = len(trace.layers)
        total = float(trace.counts_RNE.sum(dtype=np.float64)) / len(trace)
        if total == 0:
            raise ValueError("the trace holds no tokens; record a run that routes some")
        recorded = total / num_ranks
        self._factor = 1.0 if tokens is None else tokens * topk / recorded
        self.pairs = recorded * self._factor

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
        alone = self._trace.part(slice(record, record + 1))
        counts_NE = alone.with_ranks(self.num_ranks).counts_NE(0)
        if self._factor == 1.0:
            return counts_NE
        # Round cumulative sums, so that a rank's total is off by less than one token.
        ends_NE = np.floor(np.cumsum(counts_NE, axis=1) * self._factor + 0.5).astype(np.int64)
        return np.diff(ends_NE, axis=1, prepend=0)

    def walk(self, chosen: int, microbatches: int = 1) -> Iterator[Step]:
        """Yield `chosen` steps, spread over the trace, with each layer's forecast at that time.

        Steps without a forecast, or without all layers, are never chosen. A step has
        `microbatches`, which take its records in turn.
        """
        steps = self.steps()
        after = self._forecast_steps(steps)
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

    def _forecast_steps(self, steps: Mapping[int, LayerRecords]) -> list[int]:
        """Return the steps that have all layers, each after a step of every layer.

        A step lacks layers if the recording started or stopped in it.
        """
        found: list[int] = []
        began: set[int] = set()
        for number, records in steps.items():
            if len(records) == self.layers == len(began):
                found.append(number)
            began |= records.keys()
        return found
