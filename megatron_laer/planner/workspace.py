"""Bytes of the buffers that exchanges of weights and gradients send from and receive into.

Legend: N ranks, E experts, C replica slots per rank; a matrix has R rows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from megatron_laer.planner.hops import Way

# Matrices of an expert: their rows, and the rows of a table that each of them is.
_Matrices = tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def restore_workspace(way: Way, matrices: _Matrices, row_bytes: int) -> dict[str, int]:
    """Return the bytes of each buffer that restores need under any layout.

    A hop sends from one buffer and receives into the other, so the largest hops give the peak next
    to the result. A home that sends directly has a copy of an expert for each replica. So the costs
    prefer a relay where its buffers would not hold these.
    """
    most = _most(way, matrices, row_bytes, row_bytes)
    return dict(zip(("send", "receive"), most, strict=True))


@lru_cache(maxsize=256)
def reduce_workspace(
    way: Way, matrices: _Matrices, grad_bytes: int, wire_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer that reduces need under any layout.

    Hops are those of a restore, backwards. Rows of slots' gradients have `grad_bytes`, and those of
    sums of such, behind the first of these hops, `wire_bytes`.
    """
    most = _most(way, matrices, wire_bytes, grad_bytes)
    return dict(zip(("receive", "send"), most, strict=True))


def _most(way: Way, matrices: _Matrices, row_bytes: int, of_slots: int) -> tuple[int, int]:
    """Return the most bytes that a rank sends and receives in any hop of a restore.

    A place of w ranks wants at most min(E, w·C) experts, and each of its ranks has at most
    min(N/w·⌈R/N⌉, R) rows of a matrix. A place of v ≥ w ranks serves v/w such places. A home sends
    each of its experts once to a place of all ranks, or directly all other ranks' replicas. Rows of
    slots have `of_slots` bytes.
    """
    geometry = way.geometry

    def rows_of(width: int) -> int:
        blocks = geometry.num_ranks // width
        return sum(
            min(blocks * -(-rows // geometry.num_ranks), rows) * each for rows, each in matrices
        )

    each = [*[row_bytes] * (len(way.links) - 1), of_slots]
    most_sent = most_received = 0
    for at, (width, wanting) in enumerate(pairwise(way.widths)):
        if not any(way.links[at].peers(geometry)):
            continue
        experts = min(geometry.num_experts, wanting * geometry.replica_slots)
        served = min(experts, geometry.home_slots)
        if way.is_direct:
            served = (geometry.num_ranks - 1) * geometry.replica_slots
        elif width >= wanting:
            served = width // wanting * experts
        most_sent = max(most_sent, served * rows_of(width) * each[at])
        if not (way.is_direct and geometry.replica_slots == 1):  # else in place
            most_received = max(most_received, experts * rows_of(wanting) * each[at])
    return most_sent, most_received
