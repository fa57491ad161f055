"""Comparison of restored experts with their owners, by sums of bits.

Legend: N ranks, C replica slots per rank, E experts, M matrices of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.placed import Placed

# Findings in one message; the dump has all.
_SHOWN = 4


@dataclass(frozen=True)
class Read:
    """Restored weights, where compute reads them first.

    Attributes:
        layer: its name.
        direction: "forward" or "backward".
        way: name of the chain of holdings by which they came.
        number: among all that the layer read in this direction in the step, from 0.
    """

    layer: str
    direction: str
    number: int
    way: str
    placed: Placed


class VerificationError(RuntimeError):
    """Restored experts that are not their owners', bit for bit."""


def differences(read: Read, slots_NCM: Int64, owned_NEM: Int64) -> Iterator[tuple[int, ...]]:
    """Yield rank, slot, expert and matrix of each matrix that is not its owner's.

    Args:
        slots_NCM: sums of bits of all ranks' slots.
        owned_NEM: sums of bits of what each rank owns of each expert. They add up, modulo 2**64.
    """
    ranks, slots, _ = slots_NCM.shape
    expert_NC = read.placed.replica_expert_S.reshape(ranks, slots).astype(np.int64)
    filled_NC = read.placed.filled_S.reshape(ranks, slots)
    expected_NCM = owned_NEM.sum(axis=0)[expert_NC]
    for rank, slot, matrix in np.argwhere((slots_NCM != expected_NCM) & filled_NC[:, :, None]):
        yield int(rank), int(slot), int(expert_NC[rank, slot]), int(matrix)


def described(
    read: Read,
    found: Sequence[tuple[int, ...]],
    sizes: Sequence[tuple[int, int]],
    group: Sequence[int],
) -> str:
    """Return a text on the first differences of one read; `group` has the ranks of the world."""
    home_slots = read.placed.geometry.home_slots
    texts = []
    for rank, slot, expert, matrix in found[:_SHOWN]:
        owner = f"its home, rank {group[expert // home_slots]}" if home_slots else "all ranks' rows"
        rows, columns = sizes[matrix]
        texts.append(
            f"slot {slot} of rank {group[rank]} has other bits of matrix {matrix + 1} of "
            f"{len(sizes)} ({rows} x {columns}) of expert {expert} than {owner}"
        )
    more = len(found) - len(texts)
    return (
        f"{read.layer}, {read.direction} {read.number + 1} of the step, by way {read.way}: "
        + "; ".join(texts)
        + (f"; and {more} more" if more else "")
    )
