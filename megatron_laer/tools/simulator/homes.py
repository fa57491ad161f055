"""Homes of experts by pairs: an order for each layer, with rows between nodes before and after.

Of a layer's steps with pairs the first half plans, and the second half counts rows; a single step
does both. Rows are those of tokens that travel once per node, with one copy of each expert. They
are counted on sets of experts where the trace has them, and otherwise expected from pairs. Tokens
are taken to come from all nodes alike.

Legend: N ranks, E experts, M nodes, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.crossings import Crossings
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.traces.records import Trace

BY_PAIRS, NO_ROWS, HEAVIER = "by pairs", "stock's: no rows saved", "stock's: a heavier rank"


@dataclass(frozen=True, eq=False)
class LayerHomes:
    """Homes of a layer, with rows per token and the heaviest rank's load over the mean.

    `homes` says whether they are those by pairs, or why stock's are kept.
    """

    layer: str
    home_slot_order_E: Int64
    homes: str
    stock_rows: float
    rows: float
    stock_max_over_mean: float
    max_over_mean: float

    @property
    def saved(self) -> float:
        return 1 - self.rows / self.stock_rows if self.stock_rows else 0.0


def homes_by_pairs(
    trace: Trace,
    geometry: Geometry,
    tolerance: float,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> list[LayerHomes]:
    """Place the experts of each layer by its pairs where that saves rows, and keep stock's else.

    Stock's are kept as well where a rank's load, over its mean, is `tolerance` above stock's. The
    capacity of `geometry` is E/N: a slot for each home. Raises ValueError for a layer without
    pairs.
    """
    assert trace.pairs is not None and geometry.num_slots == geometry.num_experts
    for layer, name in enumerate(trace.layers):
        if not trace.pairs.of_layer(layer).any():
            raise ValueError(f"{name} has no pairs of experts; record it with the others")
    return [
        _of_layer(trace, layer, geometry, tolerance)
        for layer, _ in enumerate(progress(trace.layers))
    ]


def _of_layer(trace: Trace, layer: int, geometry: Geometry, tolerance: float) -> LayerHomes:
    assert trace.pairs is not None
    pairs, num_nodes, stock_E = trace.pairs, geometry.num_nodes, np.arange(geometry.num_experts)
    planned, counted = _halves(pairs.step_P[pairs.layer_P == layer])
    sets = [
        sets_TE
        for (at, of), sets_TE in trace.sets.items()
        if of == layer and at in counted and len(sets_TE)
    ]
    expected = Crossings(pairs.of_layer(layer, counted))
    load_E = pairs.of_layer(layer).diagonal()

    def rows(order_E: Int64) -> float:
        node_E = np.empty_like(order_E)  # home node of each expert
        node_E[order_E] = stock_E * num_nodes // len(stock_E)
        if sets:
            hosts_ME = node_E == np.arange(num_nodes)[:, None]
            return rows_of_sets(np.concatenate(sets), hosts_ME)
        return expected.rows(node_E, num_nodes)

    def max_over_mean(order_E: Int64) -> float:
        load_N = load_E[order_E].reshape(geometry.num_ranks, -1).sum(axis=1)
        return float(load_N.max() / max(load_N.mean(), 1.0))

    stock = rows(stock_E), max_over_mean(stock_E)
    order_E, homes = place_together(pairs.of_layer(layer, planned), geometry), BY_PAIRS
    if max_over_mean(order_E) > stock[1] + tolerance:
        order_E, homes = stock_E, HEAVIER
    elif rows(order_E) >= stock[0]:
        order_E, homes = stock_E, NO_ROWS
    return LayerHomes(
        layer=trace.layers[layer],
        home_slot_order_E=order_E,
        homes=homes,
        stock_rows=stock[0],
        rows=rows(order_E),
        stock_max_over_mean=stock[1],
        max_over_mean=max_over_mean(order_E),
    )


def rows_of_sets(sets_TE: Bool, hosts_ME: Bool) -> float:
    """Return a token's rows to other nodes than its own, which each node is alike."""
    visits_TM = sets_TE.astype(np.float32) @ hosts_ME.T.astype(np.float32) > 0
    return (1 - 1 / len(hosts_ME)) * float(visits_TM.sum(axis=1).mean())


def _halves(step_P: Int64) -> tuple[range, range]:
    """Return the steps that plan and those that count."""
    steps = np.unique(step_P)
    first, middle, end = int(steps[0]), int(steps[len(steps) // 2]), int(steps[-1]) + 1
    return (range(first, middle) if middle > first else range(first, end)), range(middle, end)
