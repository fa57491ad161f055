"""Choice of stock's expert-parallel group: the fastest of those that a user could take.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_laer.tools.simulator.iteration.methods import (
    STOCK,
    Method,
    MethodSettings,
    make_method,
)
from megatron_laer.tools.simulator.iteration.predict import IterationPrediction
from megatron_laer.tools.simulator.iteration.rates import Rates

Predict = Callable[[Sequence[Method]], Sequence[IterationPrediction]]


def stock_sizes(num_ranks: int, num_experts: int) -> list[int]:
    """Return the sizes of groups that divide N and E."""
    both = math.gcd(num_ranks, num_experts)
    return [size for size in range(1, both + 1) if both % size == 0]


def fastest_stock(
    settings: MethodSettings, rates: Rates, predict: Predict, most_bytes: float | None
) -> Method:
    """Return stock in the group that was given, else in the fastest of those that fit in memory.

    Groups smaller than a node only count under a limit of memory: without one, each rank could hold
    all experts. If none fits, it is the group that needs least.
    """
    geometry = settings.geometry
    groups = stock_sizes(geometry.num_ranks, geometry.num_experts)
    if most_bytes is None:
        in_node = max(size for size in groups if size <= geometry.node_size)
        groups = [size for size in groups if size >= in_node]
    if settings.stock_group is not None:
        groups = [settings.stock_group]
    made = [make_method(STOCK, replace(settings, stock_group=group), rates) for group in groups]
    if len(made) == 1:
        return made[0]
    found = predict([replace(method, name=f"{STOCK} EP{method.group}") for method in made])
    order = sorted(range(len(made)), key=lambda place: found[place].iteration_s)
    fits = [place for place in order if most_bytes is None or found[place].peak_bytes <= most_bytes]
    least = min(order, key=lambda place: found[place].peak_bytes)
    return made[(fits or [least])[0]]
