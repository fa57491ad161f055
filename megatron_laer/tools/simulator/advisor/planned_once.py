"""A method whose layers are planned once, though several runs of it are predicted.

Runs that differ in microbatches have the same plans, whose making takes most of a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_laer.arrays import Int64
from megatron_laer.tools.simulator.iteration.methods import LayerPlanner, Method
from megatron_laer.tools.simulator.iteration.work import LayerWork


def planned_once(method: Method, layers: int) -> Method:
    """Return the method with remembered plans; the first run must have the most microbatches."""
    planners = [_Remembering(method.layer_planner(layer)) for layer in range(layers)]

    def planner_of(layer: int) -> LayerPlanner:
        planners[layer].step = -1
        return planners[layer]

    in_bf16 = None if method.in_bf16 is None else planned_once(method.in_bf16, layers)
    return replace(method, layer_planner=planner_of, in_bf16=in_bf16)


@dataclass
class _Remembering:
    planner: LayerPlanner
    step: int = -1
    _microbatch: int = 0
    _works: list[list[LayerWork]] = field(default_factory=list)

    def begin_step(self, forecast_NE: Int64) -> None:
        self.step, self._microbatch = self.step + 1, 0
        if self.step == len(self._works):
            self.planner.begin_step(forecast_NE)
            self._works.append([])

    def work(self, counts_NE: Int64) -> LayerWork:
        works = self._works[self.step]
        if self._microbatch == len(works):
            works.append(self.planner.work(counts_NE))
        self._microbatch += 1
        return works[self._microbatch - 1]
