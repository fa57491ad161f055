"""Homes that keep experts which tokens choose together in one node, from counts of pairs.

`place_together` searches for nodes with few expected rows (`crossings.py`) and alike loads, then
deals each node's experts to its ranks by load. The search is `native/node_experts.hpp`. Replicas
take over balance, and do not guide it.

Legend: N ranks, E experts, G ranks per node.
"""

from __future__ import annotations

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.crossings import Crossings
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.native_core import native

# Any fixed number: the same pairs give the same homes.
_SEED = 2602
# Steps of the annealing for each expert.
_STEPS = 128


def place_together(pairs_EE: Int64, geometry: Geometry) -> Int64:
    """Return the experts in the order of their homes; deterministic."""
    if pairs_EE.shape != (geometry.num_experts, geometry.num_experts):
        raise ValueError(
            f"pairs_EE has shape {pairs_EE.shape}, but the planner is for {geometry.num_experts} "
            "experts; give pairs of the same model"
        )
    nodes, top_k = geometry.num_nodes, Crossings(pairs_EE).top_k
    node_E = native.together(pairs_EE, nodes, top_k, _STEPS * geometry.num_experts, _SEED)
    experts_MX = np.argsort(node_E, kind="stable").reshape(nodes, -1)
    load_E = pairs_EE.diagonal()
    return np.concatenate([_dealt(of, load_E, geometry.node_size) for of in experts_MX])


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
