"""Layouts that keep experts which tokens choose together in one node, from counts of pairs.

`place_together` searches for the layout with fewest expected rows (`crossings.py`) at balanced
loads. The search is `native/node_experts.hpp` and `native/rank_experts.hpp`:

1. Every expert has a main place in one node. Places are swapped while more pairs are inside nodes.
2. Replicas fill the other slots, and both move at random while expected rows fall (annealing).
3. Inside nodes, experts are dealt to ranks by load. Slots change places until ranks can be balanced
   under drifting loads too. Drift is of single experts and, from pairs, of whole topics.

With experts at home, the main places of a rank are its home slots: `Placement.home_slot_order_E`
is the permutation of experts for `--fsep-homes`. Rank 0 plans alone, so floats are allowed.

Legend: N ranks, E experts, C slots per rank, S = N*C slots, M nodes, X loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.planner.crossings import Crossings, hosts_of
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native

# Any fixed number: the same pairs give the same layout.
_SEED = 2602
# Steps of the annealing for each slot, and tries to balance drifted loads.
_STEPS_PER_SLOT, _REPAIRS = 128, 600
# Loads under which ranks must be balanced; log-deviations of an expert's load and of a topic's.
_DRIFTS, _EXPERT_DRIFT, _TOPIC_DRIFT = 6, 0.25, 0.5
# A drifted load has some tokens per rank more or fewer than another, of this number.
_TOKENS_PER_RANK = 2000


@dataclass(frozen=True, eq=False)
class Placement:
    """Layout by pairs, and its experts in the order of their homes.

    The layout has experts' own numbers; `HomeOrder.layout_of_positions` numbers it by home. Without
    homes the order is empty.
    """

    layout: ExpertLayout
    home_slot_order_E: Int64
    rows_per_token: float


def place_together(
    pairs_EE: Int64, geometry: Geometry, counts_NE: Int64 | None = None
) -> Placement:
    """Return the layout with few rows between nodes at balanced loads; deterministic.

    `counts_NE` are the tokens of each rank for each expert, where ranks' tokens differ. The layout
    by counts alone is returned if it is expected to send fewer rows.
    """
    if pairs_EE.shape != (geometry.num_experts, geometry.num_experts):
        raise ValueError(
            f"pairs_EE has shape {pairs_EE.shape}, but the planner is for {geometry.num_experts} "
            "experts; give pairs of the same model"
        )
    counts_ME = None
    if counts_NE is not None:
        geometry.check_counts(counts_NE.shape)
        counts_ME = counts_NE.reshape(geometry.num_nodes, geometry.node_size, -1).sum(axis=1)
    crossings = Crossings(pairs_EE, geometry.num_nodes, counts_ME)
    rng = np.random.default_rng(_SEED)
    slots_S, rows = native.together(
        pairs_EE,
        crossings.source_counts_ME,
        drifted_loads(pairs_EE, geometry.num_ranks, rng),
        geometry.node_size,
        geometry.capacity,
        geometry.home_slots,
        crossings.top_k,
        _STEPS_PER_SLOT * geometry.num_slots,
        _REPAIRS,
        _SEED,
    )
    by_counts = _by_counts(crossings, geometry, counts_NE)
    if by_counts.rows_per_token < rows:
        return by_counts
    layout = ExpertLayout.from_slots(*geometry.shape, slots_S)
    home_NC = slots_S.reshape(geometry.num_ranks, -1)[:, : geometry.home_slots]
    return Placement(layout, home_NC.reshape(-1).astype(np.int64), rows)


def _by_counts(crossings: Crossings, geometry: Geometry, counts_NE: Int64 | None) -> Placement:
    """Return the layout that is planned without pairs, with experts at home as stock has them."""
    if counts_NE is None:
        counts_NE = np.tile(crossings.pairs_EE.diagonal(), (geometry.num_ranks, 1))
    layout = GreedyStrategy(geometry).plan(counts_NE, geometry.static_layout)
    stock_order_E = np.arange(geometry.home_slots * geometry.num_ranks)
    return Placement(layout, stock_order_E, crossings.rows(hosts_of(layout, geometry)))


def drifted_loads(pairs_EE: Int64, num_ranks: int, rng: np.random.Generator) -> Int64:
    """Return the experts' loads as counted, and under drift of topics and of single experts.

    Tokens of some experts become more frequent, and their other experts with them. int64 [X, E].
    """
    loads_EE: npt.NDArray[np.float64] = pairs_EE.astype(np.float64)
    loads = [loads_EE.diagonal()]
    for _ in range(_DRIFTS):
        weight_E = np.exp(_TOPIC_DRIFT * rng.normal(size=len(pairs_EE)))
        loads.append((weight_E @ loads_EE) * np.exp(_EXPERT_DRIFT * rng.normal(size=len(pairs_EE))))
    loads_XE = np.array(loads)
    tokens_X1 = np.maximum(loads_XE.sum(axis=1, keepdims=True), 1.0)
    wanted_XE = loads_XE * (_TOKENS_PER_RANK * num_ranks / tokens_X1)
    return np.maximum(np.rint(wanted_XE), 1).astype(np.int64)
