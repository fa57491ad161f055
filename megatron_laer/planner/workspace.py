"""Bytes of the buffers that exchanges of weights and gradients send from and receive into.

Legend: N ranks, E experts, C replica slots per rank, G ranks per node, M = N/G nodes; a matrix
has R rows and K columns.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_laer.planner.geometry import Geometry


@lru_cache(maxsize=256)
def restore_workspace(
    geometry: Geometry, rows: int, columns: int, element_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer that restores of one matrix need under any layout.

    With r = ⌈R/N⌉ rows of a rank and P = min(M·r, R) rows of a local rank on all nodes together:

        send     max(min(N·C, M·E)·r if M > 1, G·C·P if G > 1)·K
        receive  max(min(E, G·C)·P if M > 1, C·R if G > 1)·K

    The stages of an exchange reuse them, so this is the peak next to the result. The geometry's
    node size is G, or N for `flat`.
    """
    nodes, slots = geometry.num_nodes, geometry.node_size * geometry.replica_slots
    block = -(-rows // geometry.num_ranks)
    local_rank_rows = min(nodes * block, rows)
    distinct = min(geometry.num_experts, slots)
    inter_node, intra_node = nodes > 1, geometry.node_size > 1
    num_sent = nodes * distinct
    row_bytes = columns * element_bytes
    return {
        "send": row_bytes
        * max(inter_node * num_sent * block, intra_node * slots * local_rank_rows),
        "receive": row_bytes
        * max(inter_node * distinct * local_rank_rows, intra_node * geometry.replica_slots * rows),
    }


@lru_cache(maxsize=256)
def reduce_workspace(
    geometry: Geometry, rows: int, columns: int, grad_bytes: int, wire_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer that reduces of one matrix need under any layout.

    With r and P as for restores, g bytes of a gradient and w of a sum between nodes:

        send      max(C·R·g if G > 1, min(E, G·C)·P·w if M > 1)·K
        receive   max(G·C·P·g if G > 1, min(N·C, M·E)·r·w if M > 1)·K
    """
    nodes, slots = geometry.num_nodes, geometry.node_size * geometry.replica_slots
    block = -(-rows // geometry.num_ranks)
    local_rank_rows = min(nodes * block, rows)
    distinct = min(geometry.num_experts, slots)
    inter_node, intra_node = nodes > 1, geometry.node_size > 1
    num_received = nodes * distinct
    intra_sent, intra_received = geometry.replica_slots * rows, slots * local_rank_rows
    inter_sent, inter_received = distinct * local_rank_rows, num_received * block
    return {
        "send": columns
        * max(intra_node * intra_sent * grad_bytes, inter_node * inter_sent * wire_bytes),
        "receive": columns
        * max(intra_node * intra_received * grad_bytes, inter_node * inter_received * wire_bytes),
    }


@lru_cache(maxsize=256)
def relay_workspace(
    geometry: Geometry, rows: int, columns: int, element_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer of a relay's first hop, next to those of `node`.

    With r = ⌈R/N⌉ rows of a rank and h home experts: those that can have replicas, whole at home
    and by rows on every rank:

        homes    min(h, X)·R·K, with X = min(E, N·C)
        rows     X·r·K
    """
    replicated = min(geometry.num_experts, geometry.num_ranks * geometry.replica_slots)
    row_bytes = columns * element_bytes
    return {
        "homes": min(geometry.home_slots, replicated) * rows * row_bytes,
        "rows": replicated * -(-rows // geometry.num_ranks) * row_bytes,
    }
