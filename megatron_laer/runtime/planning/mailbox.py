"""Collection of each microbatch's counts on the planner rank, and of their sums per step.

Legend: N ranks, E experts, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.telemetry.trace_file import TraceWriter

Planner = Callable[[int, int, Int64], None]


class RoutingMailbox:
    """Counts of routed microbatches on their way to the recorder and the planner.

    `planner` receives step, layer and the layer's counts with its last microbatch of the step, and
    must not change them. They are the step's sum, int64 [N, E], or with a `window` the counts of as
    many last microbatches, int64 [M, N, E]. `trace`, the recording of each microbatch with experts
    in place of home positions, is closed here. No error here stops training; `faults` counts those
    of the planner.
    """

    def __init__(
        self,
        layers: Sequence[str],
        homes: Sequence[HomeOrder],
        planner: Planner | None,
        trace: TraceWriter | None,
        on_warning: Callable[[str], None],
        window: int = 0,
    ) -> None:
        self.faults = 0
        self._window = window
        self._layers = layers
        self._homes = homes
        self._planner = planner
        self._trace = trace
        self._on_warning = on_warning
        self._step = 0
        self._num_microbatches: int | None = None
        # By layer: the sum alone, or the microbatches of the window.
        self._newest_MNE: dict[int, list[Int64]] = {}

    def begin_step(self, step: int, num_microbatches: int | None) -> None:
        self._step, self._num_microbatches = step, num_microbatches
        self._newest_MNE.clear()

    def put(self, layer: int, microbatch: int, counts_NE: Int64) -> None:
        if self._trace is not None:
            by_expert_NE = self._homes[layer].by_expert(counts_NE)
            self._record(TraceWriter.append, layer, microbatch=microbatch, counts_NE=by_expert_NE)
        if self._planner is None:
            return
        before_MNE = self._newest_MNE.get(layer, []) if microbatch else []
        if self._window or not before_MNE:
            self._newest_MNE[layer] = [*before_MNE, counts_NE.copy()][-self._window :]
        else:
            self._newest_MNE[layer] = [before_MNE[0] + counts_NE]
        if microbatch + 1 == self._num_microbatches:
            self._deliver(layer)

    def put_pairs(self, pairs_LEE: Int64, chosen_LTE: Bool) -> None:
        """Record the step's pairs and sampled sets of each layer, of home positions."""
        if self._trace is None:
            return
        for layer, pairs_EE in enumerate(pairs_LEE):
            by_expert_EE = self._homes[layer].pairs_by_expert(pairs_EE)
            self._record(TraceWriter.append_pairs, layer, pairs_EE=by_expert_EE)
        for layer, chosen_TE in enumerate(chosen_LTE):
            is_token_T = chosen_TE.any(axis=1)
            if is_token_T.any():
                its_TE = self._homes[layer].by_expert(chosen_TE[is_token_T])
                self._record(TraceWriter.append_sets, layer, chosen_TE=its_TE)

    def end_step(self) -> None:
        """Deliver the sums of a step whose number of microbatches was unknown."""
        if self._num_microbatches is None:
            for layer in list(self._newest_MNE):
                self._deliver(layer)

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    def _deliver(self, layer: int) -> None:
        assert self._planner is not None
        newest_MNE = self._newest_MNE[layer]
        try:
            self._planner(
                self._step, layer, np.stack(newest_MNE) if self._window else newest_MNE[0]
            )
        except Exception as error:
            self.faults += 1
            self._on_warning(
                f"the routing of step {self._step}, {self._layers[layer]} is not planned from: "
                f"{error!r}"
            )

    def _record(self, append: Callable[..., None], layer: int, **values: Any) -> None:
        if self._trace is None:
            return
        try:
            append(self._trace, step=self._step, layer_index=layer, **values)
        except (OSError, ValueError) as error:
            self._on_warning(f"the recording of routing ends at step {self._step}: {error}")
            self.close()
