"""Homes that keep experts which tokens choose together in one node, from counts of pairs.

`place_together` searches for homes with few expected rows (`crossings.py`) where nodes have alike
loads. The search is `native/node_experts.hpp`:

1. Every expert has a home in one node. Homes are swapped while more pairs are inside nodes.
2. Replicas fill the other slots, and both move at random while expected rows fall (annealing).

Only homes are kept: replicas take over balance while these are searched for. Inside nodes, homes
are dealt to ranks by load.

Legend: N ranks, E experts, C slots per rank, G ranks per node.
"""

from __future__ import annotations

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.crossings import Crossings
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.native_core import native

# Any fixed number: the same pairs give the same homes.
_SEED = 2602
# Steps of the annealing for each slot.
_STEPS_PER_SLOT = 128


def place_together(pairs_EE: Int64, geometry: Geometry) -> Int64:
    """Return the experts in the order of their homes; deterministic.

    Slots above E/N are for replicas.
    """
    if pairs_EE.shape != (geometry.num_experts, geometry.num_experts):
        raise ValueError(
            f"pairs_EE has shape {pairs_EE.shape}, but the planner is for {geometry.num_experts} "
            "experts; give pairs of the same model"
        )
    of_nodes_E = native.together(
        pairs_EE,
        geometry.num_nodes,
        geometry.node_size * geometry.capacity,
        Crossings(pairs_EE).top_k,
        _STEPS_PER_SLOT * geometry.num_slots,
        _SEED,
    )
    load_E, size = pairs_EE.diagonal(), geometry.node_size
    nodes = of_nodes_E.reshape(geometry.num_nodes, -1)
    return np.concatenate([_dealt(experts_X, load_E, size) for experts_X in nodes])


def _dealt(experts_X: Int64, load_E: Int64, ranks: int) -> Int64:
    """Order a node's experts by rank: heaviest first, each to the least loaded one with room."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    load_G = np.zeros(ranks, dtype=np.int64)
    for expert in experts_X[np.argsort(-load_E[experts_X], kind="stable")].tolist():
        has_room_G = np.array([len(of) * ranks < len(experts_X) for of in held])
        rank = int(np.argmin(np.where(has_room_G, load_G, np.iinfo(np.int64).max)))
        held[rank].append(expert)
        load_G[rank] += load_E[expert]
    return np.array(held, dtype=np.int64).reshape(-1)
