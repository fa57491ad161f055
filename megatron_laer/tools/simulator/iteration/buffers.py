"""Memory of FSEP's workspaces and payloads, and of libraries with its communicators."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_laer.planner.clusters import Card
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.workspace import reduce_workspace, restore_workspace

# Bytes of an element of gradients that are summed over a step.
SUM_BYTES = 4


def buffers(
    geometry: Geometry, costs: CostModel, card: Card | None, *, holds_step: bool = False
) -> dict[str, float]:
    """Return the bytes of workspaces and payloads, and of libraries with FSEP's communicators.

    Homes make the payloads of all experts that they send before one launch packs them. With
    `holds_step` gradients are sums.
    """
    num_ranks, node_size = geometry.num_ranks, geometry.node_size
    ways = costs.ways(geometry)
    form, grads = costs.weights_form(geometry.sharding), costs.grads_form
    sums = SUM_BYTES if holds_step else grads.bytes_per_element
    # Ways before the last, a relay over all ranks, are taken where its buffers have room.
    wire = sums if costs.by_layout else grads.bytes_per_element
    restores = restore_workspace(ways[-1], form.matrices, form.bytes_per_element)
    reduces = reduce_workspace(ways[-1], grads.matrices, sums, wire)
    workspaces = sum(restores.values()) + sum(reduces.values())
    peers = [link.peers(geometry) for link in {link for way in ways for link in way.links}]
    # Besides tokens'; NCCL takes memory at first use.
    exchanges = [(1 + near + far, 1 + near) for near, far in peers] * 2
    tokens = [(num_ranks, node_size)]
    if 1 < node_size < num_ranks and costs.tokens.in_stages:
        tokens += [(node_size, node_size), (geometry.num_nodes, 1)]
    found = {"workspaces": workspaces, **library_bytes(card, tokens, exchanges)}
    if form != grads:
        most_sent = min(geometry.home_slots, geometry.replica_slots * (num_ranks - 1))
        elements = sum(rows * columns for rows, columns in form.matrices)
        found["payloads"] = most_sent * elements * form.bytes_per_element
    return found


def library_bytes(
    card: Card | None,
    groups: Sequence[tuple[int, int]],
    of_exchanges: Sequence[tuple[int, int]] = (),
) -> dict[str, float]:
    """Estimate the bytes of CUDA and of NCCL's communicators, by their ranks and node size."""
    if card is None:
        return {}
    nccl = sum(card.communicator_bytes(*group) for group in groups)
    nccl += sum(card.communicator_bytes(*group, of_exchange=True) for group in of_exchanges)
    return {"libraries": card.context_gib * 2**30 + nccl}
