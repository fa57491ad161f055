"""Comparison of restored experts with their owners, by sums of bits.

Legend: N ranks, C replica slots per rank, E experts, M matrices of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.verify.checked import Checked


def differences(read: Checked, slots_NCM: Int64, owned_EM: Int64) -> Iterator[tuple[int, str]]:
    """Yield rank and description of each matrix that is not its owner's.

    Args:
        slots_NCM: sums of bits of all ranks' slots.
        owned_EM: sums of bits of all experts, at their owners.
    """
    ranks, slots, _ = slots_NCM.shape
    expert_NC = read.placed.replica_expert_S.reshape(ranks, slots).astype(np.int64)
    filled_NC = read.placed.filled_S.reshape(ranks, slots)
    wrong_NCM = (slots_NCM != owned_EM[expert_NC]) & filled_NC[:, :, None]
    for rank, slot, matrix in np.argwhere(wrong_NCM):
        expert = int(expert_NC[rank, slot])
        yield (
            int(rank),
            f"slot {slot} of rank {read.ranks[rank]} has other bits of "
            f"{read.matrix(matrix, expert)} than {read.owner(expert)}",
        )
