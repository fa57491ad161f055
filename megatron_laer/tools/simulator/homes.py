"""Homes of experts by pairs: an order for each layer, with rows between nodes before and after.

Of the steps with pairs the first half plans, and the second half counts rows; a single step does
both. Rows are those of tokens that travel once per node, with one copy of each expert. They are
counted on sets of experts where the trace has them, and otherwise expected from pairs. Tokens are
taken to come from all nodes alike.

Legend: N ranks, E experts, M nodes, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Sharding
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.crossings import Crossings
from megatron_laer.planner.geometry import Geometry
from megatron_laer.tools.traces.records import PairRecords, Trace

# Replicas take over balance, so that homes need less of it. Neither none nor many is always better.
_REPLICA_SLOTS = (0, 1, 4)

BY_PAIRS, NO_ROWS, HEAVIER = "by pairs", "stock's: no rows saved", "stock's: a heavier rank"


@dataclass(frozen=True, eq=False)
class LayerHomes:
    """Homes of a layer, with rows per token and the heaviest rank's load over the mean.

    `homes` says whether they are those by pairs, or why stock's are kept. `pair_rows` would be sent
    with a row for each pair of a token and an expert. `sampled_tokens` have sets that were counted;
    with 0, rows are expected from pairs.
    """

    layer: str
    home_slot_order_E: Int64
    homes: str
    pair_rows: float
    stock_rows: float
    rows: float
    stock_max_over_mean: float
    max_over_mean: float
    sampled_tokens: int

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
    capacity of `geometry` is E/N: a slot for each home.
    """
    assert trace.pairs is not None and geometry.num_slots == geometry.num_experts
    return [
        _of_layer(trace, trace.pairs, layer, geometry, tolerance)
        for layer, _ in enumerate(progress(trace.layers))
    ]


def _of_layer(
    trace: Trace, pairs: PairRecords, layer: int, geometry: Geometry, tolerance: float
) -> LayerHomes:
    planned, counted = _halves(pairs.step_P)
    sets = [sets_TE for (at, of), sets_TE in trace.sets.items() if of == layer and at in counted]
    sets_TE = np.concatenate(sets) if sets else np.zeros((0, geometry.num_experts), dtype=np.bool_)
    expected = Crossings(pairs.of_layer(layer, counted))
    load_E = pairs.of_layer(layer).diagonal()

    def rows(order_E: Int64) -> float:
        hosts_ME = _hosts(order_E, geometry.num_nodes)
        return rows_of_sets(sets_TE, hosts_ME) if len(sets_TE) else expected.rows(hosts_ME)

    def max_over_mean(order_E: Int64) -> float:
        load_N = load_E[order_E].reshape(geometry.num_ranks, -1).sum(axis=1)
        return float(load_N.max() / max(load_N.mean(), 1.0))

    stock_E = np.arange(geometry.num_experts)
    most = max_over_mean(stock_E) + tolerance
    found = _orders(pairs.of_layer(layer, planned), geometry)
    order_E = next((one_E for one_E in found if max_over_mean(one_E) <= most), stock_E)
    homes = BY_PAIRS if order_E is not stock_E else HEAVIER
    if rows(order_E) >= rows(stock_E) and homes == BY_PAIRS:
        order_E, homes = stock_E, NO_ROWS
    return LayerHomes(
        trace.layers[layer],
        order_E,
        homes,
        expected.top_k * (1 - 1 / geometry.num_nodes),
        rows(stock_E),
        rows(order_E),
        max_over_mean(stock_E),
        max_over_mean(order_E),
        len(sets_TE),
    )


def _orders(pairs_EE: Int64, geometry: Geometry) -> list[Int64]:
    """Return experts in the order of homes, for each number of replica slots; fewest rows first."""
    orders = []
    for slots in _REPLICA_SLOTS:
        capacity = min(geometry.capacity + slots, geometry.num_experts)
        # Without replica slots the layout by counts may have any home.
        sharding = Sharding.ROWS if capacity == geometry.capacity else Sharding.EXPERTS
        with_slots = replace(geometry, capacity=capacity, sharding=sharding)
        orders.append(place_together(pairs_EE, with_slots))
    crossings = Crossings(pairs_EE)
    return sorted(orders, key=lambda order_E: crossings.rows(_hosts(order_E, geometry.num_nodes)))


def rows_of_sets(sets_TE: Bool, hosts_ME: Bool) -> float:
    """Return a token's rows to other nodes than its own, which each node is alike."""
    visits_TM = sets_TE.astype(np.float32) @ hosts_ME.T.astype(np.float32) > 0
    return (1 - 1 / len(hosts_ME)) * float(visits_TM.sum(axis=1).mean())


def _halves(step_P: Int64) -> tuple[range, range]:
    """Return the steps that plan and those that count."""
    steps = np.unique(step_P)
    first, middle, end = int(steps[0]), int(steps[len(steps) // 2]), int(steps[-1]) + 1
    return (range(first, middle) if middle > first else range(first, end)), range(middle, end)


def _hosts(order_E: Int64, num_nodes: int) -> Bool:
    """Return the experts at home on each node, bool [M, E]."""
    hosts_ME = np.zeros((num_nodes, len(order_E)), dtype=np.bool_)
    np.put_along_axis(hosts_ME, order_E.reshape(num_nodes, -1), True, axis=1)
    return hosts_ME
