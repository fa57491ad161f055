"""Homes that keep experts which tokens choose together in one node, from counts of pairs.

`place_together` searches for homes with few expected rows (`crossings.py`) at balanced loads. The
search is `native/node_experts.hpp` and `native/rank_experts.hpp`:

1. Every expert has a home in one node. Homes are swapped while more pairs are inside nodes.
2. Replicas fill the other slots, and both move at random while expected rows fall (annealing).
3. Inside nodes, experts are dealt to ranks by load. Slots change places until ranks can be balanced
   under drifting loads too. Drift is of single experts and, from pairs, of whole topics.

Only homes are kept: replicas take over balance while these are searched for.

Legend: N ranks, E experts, C slots per rank, X loads.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Int64
from megatron_laer.planner.crossings import Crossings, hosts_of
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.native_core import native

# Any fixed number: the same pairs give the same homes.
_SEED = 2602
# Steps of the annealing for each slot, and tries to balance drifted loads.
_STEPS_PER_SLOT, _REPAIRS = 128, 600
# Loads under which ranks must be balanced; log-deviations of an expert's load and of a topic's.
_DRIFTS, _EXPERT_DRIFT, _TOPIC_DRIFT = 6, 0.25, 0.5
# A drifted load has some tokens per rank more or fewer than another, of this number.
_TOKENS_PER_RANK = 2000


def place_together(pairs_EE: Int64, geometry: Geometry) -> Int64:
    """Return the experts in the order of their homes; deterministic.

    Slots above E/N are for replicas. The homes of the layout by counts are returned if that layout
    is expected to send fewer rows.
    """
    if pairs_EE.shape != (geometry.num_experts, geometry.num_experts):
        raise ValueError(
            f"pairs_EE has shape {pairs_EE.shape}, but the planner is for {geometry.num_experts} "
            "experts; give pairs of the same model"
        )
    crossings = Crossings(pairs_EE)
    slots_S, rows = native.together(
        pairs_EE,
        drifted_loads(pairs_EE, geometry.num_ranks, np.random.default_rng(_SEED)),
        geometry.num_nodes,
        geometry.node_size,
        geometry.capacity,
        crossings.top_k,
        _STEPS_PER_SLOT * geometry.num_slots,
        _REPAIRS,
        _SEED,
    )
    counts_NE = np.tile(pairs_EE.diagonal(), (geometry.num_ranks, 1))
    by_counts = GreedyStrategy(geometry).plan(counts_NE, geometry.static_layout)
    if crossings.rows(hosts_of(by_counts, geometry)) < rows:
        slots_S = by_counts.slot_expert_S
    home_slots = geometry.num_experts // geometry.num_ranks
    return slots_S.reshape(geometry.num_ranks, -1)[:, :home_slots].reshape(-1).astype(np.int64)


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
