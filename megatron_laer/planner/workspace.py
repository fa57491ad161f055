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

    A hop sends from one buffer and receives into the other, so the largest hops give the peak next
    to the result. Only a home that sends directly can need more: its buffer has a copy of an expert
    for each replica.
    """
    most = _most(way, rows, columns, element_bytes, element_bytes)
    return dict(zip(("send", "receive"), most, strict=True))


@lru_cache(maxsize=256)
def reduce_workspace(
    way: Way, rows: int, columns: int, grad_bytes: int, wire_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer that reduces of one matrix need under any layout.

    Hops are those of a restore, backwards. Gradients of slots have `grad_bytes` per element, and
    sums of such, behind the first of these hops, `wire_bytes`.
    """
    most = _most(way, rows, columns, wire_bytes, grad_bytes)
    return dict(zip(("receive", "send"), most, strict=True))


def _most(way: Way, rows: int, columns: int, element_bytes: int, of_slots: int) -> tuple[int, int]:
    """Return the most bytes that a rank sends and receives in any hop of a restore.

    A place of w ranks wants at most min(E, w·C) experts, and each of its ranks has at most
    min(N/w·⌈R/N⌉, R) rows of one. A place of v ≥ w ranks serves v/w such places. A home sends each
    of its experts once to a place of all ranks. Slots receive elements of `of_slots` bytes.
    """
    geometry = way.geometry
    block = -(-rows // geometry.num_ranks)
    each = [*[element_bytes] * (len(way.links) - 1), of_slots]
    most_sent = most_received = 0
    for at, (width, wanting) in enumerate(pairwise(way.widths)):
        if not any(way.links[at].peers(geometry)):
            continue
        experts = min(geometry.num_experts, wanting * geometry.replica_slots)
        served = min(experts, geometry.home_slots)
        if width >= wanting:
            served = width // wanting * experts
        held, wanted = (min(geometry.num_ranks // of * block, rows) for of in (width, wanting))
        most_sent = max(most_sent, served * held * columns * each[at])
        most_received = max(most_received, experts * wanted * columns * each[at])
    return most_sent, most_received
