"""Rates of a rank's GEMMs, memory and links, from the cluster's file.

The file has a spread for each constant, so that iterations are predicted as a range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.gemm_curve import GemmCurve
from megatron_laer.precision import Precision

# Standard deviation of cards' speed: large clusters span 8 to 9 % (Sinha et al., SC 2022).
_CARDS_DIFFER = 0.015
# Latency of a ring's step inside a node and between nodes, from NCCL's tuning model (Simple).
_STEP_S, _FAR_STEP_S = 3.4e-6, 1.4e-5

# Spreads for a cluster file without one. Two profiles of GEMMs in LAER-MoE's artifact differ by a
# tenth; its All-to-Alls range from the data sheet's rate to a third of it.
_GUESSED = {
    "gemm": (0.9, 1.1),
    "intra.bytes_per_s": (1 / 3, 1.0),
    "inter.bytes_per_s": (1 / 3, 1.0),
}
_OF_LINKS = ("intra.", "inter.", "contention.exchange")
_RATES = ("gemm", "memory_bytes_per_s", "intra.bytes_per_s", "inter.bytes_per_s")


@dataclass(frozen=True)
class Rates:
    """One set of constants of a rank.

    `gap_s` is host time once per iteration. `overhead` is a layer's time beyond FLOPs and bytes,
    over the bytes' time. Linear layers multiply in `precision`.
    """

    cluster: Cluster
    bytes_per_element: int
    gap_s: float = 0.0
    overhead: float = 0.0
    precision: Precision = Precision.PARAMETERS

    @property
    def linear_gemm(self) -> GemmCurve:
        """Return the speed of linear layers other than the LM head."""
        return self.cluster.gemm_in(self.precision)

    @property
    def best_flops_per_s(self) -> float:
        """Return the fastest GEMM's speed in the parameters' precision."""
        return max(speed for _, speed in self.cluster.gemm.points)

    @property
    def peak_flops_per_s(self) -> float:
        return max(speed for _, speed in self.linear_gemm.points)

    def gemm_seconds(self, tokens: float, flops_per_token: float, *, is_linear: bool) -> float:
        gemm = self.linear_gemm if is_linear else self.cluster.gemm
        unit_s = gemm.unit_seconds(np.array([math.ceil(tokens)]))
        return float(unit_s[0]) * flops_per_token

    def memory_seconds(self, moved_bytes: float) -> float:
        return moved_bytes / self.cluster.memory_rate(self.bytes_per_element)

    def layer_memory_seconds(self, moved_bytes: float) -> float:
        """Return the time of a layer's operations that move so many bytes."""
        return self.memory_seconds(moved_bytes) * (1 + self.overhead)

    def collective_seconds(self, ranks: int, node_size: int) -> float:
        near = min(ranks, node_size) - 1
        return self.cluster.collective_seconds(near, ranks - near - 1)

    def ring_seconds(self, size_bytes: float, ranks: int, node_size: int, stride: int = 1) -> float:
        """Return the time of a reduce-scatter or an all-gather of a buffer of this size.

        A ring passes each link with all but one rank's share. Between nodes, its ranks on a node
        use their adapters together; the ranks between them run rings of their own.
        """
        if ranks <= 1:
            return 0.0
        intra, inter = self.cluster.intra, self.cluster.inter
        share = size_bytes * (ranks - 1) / ranks
        near = max(node_size // stride, 1)  # of the ring's ranks on one node
        seconds = share / intra.bytes_per_s if near > 1 else 0.0
        latency_s = intra.latency_s + (min(near, ranks) - 1) * _STEP_S
        if ranks > near:
            seconds = max(seconds, share / (near * inter.bytes_per_s))
            latency_s = inter.latency_s + (near - 1) * _STEP_S + (ranks / near - 1) * _FAR_STEP_S
        return seconds + latency_s


def slowest_pace(ranks: int) -> float:
    """Return the time of the slowest of these cards, for which others wait, over the mean."""
    # Blom's approximation of the largest of normal draws.
    return 1.0 + _CARDS_DIFFER * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def rate_sets(rates: Rates) -> tuple[Rates, ...]:
    """Return the rates, then those with compute and links at either end of their spreads.

    Four corners are needed: exchanges are exposed most where compute is fast and links are slow.
    """
    ends = {name: (spread.low, spread.high) for name, spread in rates.cluster.spreads}
    for name, (low, high) in _GUESSED.items():
        if name not in ends and (value := rates.cluster.constant(name)) is not None:
            ends[name] = low * value, high * value
    found = [rates]
    for fast_compute in (True, False):
        for fast_links in (True, False):
            values = {}
            for name, (low, high) in ends.items():
                fast = fast_links if name.startswith(_OF_LINKS) else fast_compute
                values[name] = high if fast == (name in _RATES) else low
            found.append(replace(rates, cluster=rates.cluster.with_constants(values)))
    return tuple(found)
