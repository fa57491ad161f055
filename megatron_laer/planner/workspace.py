"""Bytes of the buffers that exchanges of weights and gradients send from and receive into.

Legend: N ranks, E experts, C replica slots per rank; a matrix has R rows and K columns.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from megatron_laer.planner.hops import Way


@lru_cache(maxsize=256)
def restore_workspace(way: Way, rows: int, columns: int, element_bytes: int) -> dict[str, int]:
    """Return the bytes of each buffer that restores of one matrix need under any layout.

    A hop sends from one buffer and receives into the other, so the largest hops (`_most_rows`) give
    the peak next to the result. Only a home that sends directly can need more: its buffer has a
    copy of an expert for each replica.
    """
    sent, received = zip(*_most_rows(way, rows), strict=True)
    row_bytes = columns * element_bytes
    return {"send": max(sent) * row_bytes, "receive": max(received) * row_bytes}


@lru_cache(maxsize=256)
def reduce_workspace(
    way: Way, rows: int, columns: int, grad_bytes: int, wire_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer that reduces of one matrix need under any layout.

    Hops are those of a restore, backwards. Gradients of slots have `grad_bytes` per element, and
    sums of such, behind the first of these hops, `wire_bytes`.
    """
    *others, (sent, received) = _most_rows(way, rows)
    most = [(received * grad_bytes, sent * grad_bytes)]
    most += [(received * wire_bytes, sent * wire_bytes) for sent, received in others]
    return {
        "send": max(sent for sent, _ in most) * columns,
        "receive": max(received for _, received in most) * columns,
    }


def _most_rows(way: Way, rows: int) -> list[tuple[int, int]]:
    """Return the most rows that a rank sends and receives in each hop of a restore.

    A place of w ranks wants at most min(E, w·C) experts, and each of its ranks has at most
    min(N/w·⌈R/N⌉, R) rows of one. A place of v ≥ w ranks serves v/w such places. A home sends each
    of its experts once to a place of all ranks.
    """
    geometry = way.geometry
    block = -(-rows // geometry.num_ranks)
    found = []
    for (width, wanting), link in zip(pairwise(way.widths), way.links, strict=True):
        experts = min(geometry.num_experts, wanting * geometry.replica_slots)
        served = min(experts, geometry.home_slots)
        if width >= wanting:
            served = width // wanting * experts
        held, wanted = (min(geometry.num_ranks // of * block, rows) for of in (width, wanting))
        has_wire = any(link.peers(geometry))
        found.append((has_wire * served * held, has_wire * experts * wanted))
    return found
