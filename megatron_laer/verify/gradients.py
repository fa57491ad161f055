"""Comparison of the gradients that slots send with the growth of the sums that take them.

A reduce is linear. So with any signs, the sums of all slots of an expert are the growth of its
owners', but for roundings. An element's is at most u·|x|. With random signs their sum exceeds eight
times their norm once in 10**14 (Hoeffding's inequality). For n replicas by h hops that norm is at
most

    ((h - 1)·u_wire + n·2**-24)·Σ‖replica‖ + (u_sum + n·2**-24)·(‖before‖ + ‖after‖)

`Exchange` has the sources of these roundings. A lost, doubled or late replica changes the sums by
about its norm. A change below the bound is unseen, as of few rows where bfloat16 goes between hops.
Infinite numbers and NaN, which a loss scale provokes, are compared with nothing.

Legend: N ranks, C replica slots per rank, E experts, M trained matrices of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_laer.arrays import Float64, Int64
from megatron_laer.verify.checked import Checked
from megatron_laer.verify.sums import SIGNS

_HOEFFDING = 8
_OF_FLOAT32 = 2.0**-24


@dataclass(frozen=True)
class Roundings:
    """Dtypes of a reduce's sums on the way and of the last ones, and its hops."""

    wire: torch.dtype
    sums: torch.dtype
    hops: int

    def bound(self, replicas: int, norms: Any, sums_norms: Any, elements: int) -> Any:
        """Return the most by which sums with signs may differ, from sums of norms, or arrays."""
        of_wire, of_sums = (torch.finfo(dtype).eps / 2 for dtype in (self.wire, self.sums))
        added = replicas * _OF_FLOAT32
        bound = ((self.hops - 1) * of_wire + added) * norms + (of_sums + added) * sums_norms
        if self.wire == torch.float16:  # below its least number
            bound += self.hops * added * elements**0.5
        return _HOEFFDING * bound


def differences(
    reduce: Checked, roundings: Roundings, slots_NCM: Float64, sums_EM: Float64
) -> Iterator[tuple[int, str]]:
    """Yield an owner's rank and a description of each matrix whose sums grew by something else.

    Args:
        slots_NCM: `signed_sums` of all ranks' slots, `[N, C, M, 5]`.
        sums_EM: those of all experts before the reduce and after it, `[E, M, 2, 5]`.
    """
    placed, slots = reduce.placed, slots_NCM.shape[1]
    expert_NC = placed.replica_expert_S.reshape(-1, slots)
    for expert in np.unique(expert_NC[placed.filled_S.reshape(-1, slots)]).tolist():
        places = np.argwhere(expert_NC == expert)
        sent_RM = slots_NCM[tuple(places.T)]
        for matrix, (rows, columns) in enumerate(reduce.sizes):
            sent, sums = sent_RM[:, matrix], sums_EM[expert, matrix]
            norms, sums_norms = (float(np.sqrt(of[:, SIGNS]).sum()) for of in (sent, sums))
            bound = roundings.bound(len(sent), norms, sums_norms, rows * columns)
            sent = sent[:, :SIGNS]
            with np.errstate(invalid="ignore"):
                lacking = sent.sum(axis=0) - (sums[1] - sums[0])[:SIGNS]
            if not (np.abs(lacking) > bound).any():
                continue
            home_slots = placed.geometry.home_slots
            yield (
                expert // home_slots if home_slots else 0,
                f"the gradients of {reduce.matrix(matrix, expert)} that {reduce.owner(expert)} "
                "added up are not those that its slots sent: "
                + _explanation(reduce, places, lacking, sent, bound),
            )


def _explanation(
    reduce: Checked, places: Int64, lacking: Float64, sent: Float64, bound: float
) -> str:
    """Name the replicas that sums lack, or have twice."""
    names = [f"slot {slot} of rank {reduce.ranks[rank]}" for rank, slot in places]
    guesses = {f"{name} is missing": of for name, of in zip(names, sent, strict=True)}
    if len(names) > 1:
        guesses["all are missing"] = sent.sum(axis=0)
    guesses |= {f"{name} counts twice": -of for name, of in zip(names, sent, strict=True)}
    for text, expected in guesses.items():
        if (np.abs(lacking - expected) <= 2 * bound).all():
            return text
    return f"they differ by {np.abs(lacking).max():.3g}, and roundings by up to {bound:.3g}"
