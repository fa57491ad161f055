"""Rates say how long a rank takes for GEMMs, memory and links; all come from the cluster's file.

A rate has a value and, at its side, how far it may be off: iterations are predicted for several
sets of rates at once, so that a range can be told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_laer.planner.clusters import Cluster, GemmCurve, Link

# Of the fastest GEMM, in the core of attention: flash attention on an A100 has 185 and 150 TFLOP/s
# forward and backward beside GEMMs of 248, by its authors' tables.
_CORE_FORWARD, _CORE_BACKWARD = 0.75, 0.60


@dataclass(frozen=True)
class Rates:
    """Holds one set of constants of a rank.

    Attributes:
        gemm: speed of a GEMM by its tokens.
        backward_factor: time of a FLOP in backward GEMMs over that in forward ones.
        memory_bytes_per_s: of operations that only read and write.
        intra, inter: links of one rank inside a node and between nodes.
        launch_s: host time of launching one kernel, where the device waits for it.
        gate_s: host time between the counts and the dispatch, without a solve.
        gap_s: once per iteration: the data loader, logging.
        contention: share by which a GEMM is slower while an exchange runs beside it.
        core_forward, core_backward: speed of attention's core over that of the fastest GEMM.
        overhead: time of dense layers that no FLOP and no byte explains, per second that these do.
    """

    gemm: GemmCurve
    backward_factor: float
    memory_bytes_per_s: float
    intra: Link
    inter: Link
    launch_s: float = 0.0
    gate_s: float = 0.0
    gap_s: float = 0.0
    contention: float = 0.0
    core_forward: float = _CORE_FORWARD
    core_backward: float = _CORE_BACKWARD
    overhead: float = 0.0

    @property
    def best_flops_per_s(self) -> float:
        """Return the speed of the fastest GEMM."""
        return max(speed for _, speed in self.gemm.points)

    def gemm_seconds(self, tokens: float, flops_per_token: float) -> float:
        """Return the time of one GEMM of so many tokens."""
        unit_s = self.gemm.unit_seconds(np.array([int(np.ceil(tokens))]))
        return float(unit_s[0]) * flops_per_token

    def memory_seconds(self, moved_bytes: float) -> float:
        """Return the time of reading and writing so many bytes."""
        return moved_bytes / self.memory_bytes_per_s

    def ring_seconds(self, size_bytes: float, ranks: int, node_size: int) -> float:
        """Return the time of a reduce-scatter or an all-gather of a buffer of this size.

        A ring passes each link with all but one rank's share; where it spans nodes, all of a node's
        ranks drive their adapters for it.
        """
        if ranks <= 1:
            return 0.0
        share = size_bytes * (ranks - 1) / ranks
        latency_s = self.intra.latency_s
        seconds = share / self.intra.bytes_per_s if node_size > 1 else 0.0
        if ranks > node_size:
            seconds = max(seconds, share / (node_size * self.inter.bytes_per_s))
            latency_s = self.inter.latency_s
        return seconds + latency_s

    def scaled(self, compute: float, links: float) -> Rates:
        """Return rates whose compute and whose links take so many times as long."""
        points = tuple((tokens, speed / compute) for tokens, speed in self.gemm.points)
        return replace(
            self,
            gemm=GemmCurve(points),
            memory_bytes_per_s=self.memory_bytes_per_s / compute,
            launch_s=self.launch_s * compute,
            gate_s=self.gate_s * compute,
            gap_s=self.gap_s * compute,
            intra=Link(self.intra.bytes_per_s / links, self.intra.latency_s * links),
            inter=Link(self.inter.bytes_per_s / links, self.inter.latency_s * links),
        )


# Where a cluster's file tells no spread. GEMMs: the six methods and models in the breakdown of
# LAER-MoE's artifact differ by 2 %, two profiles of it by 10 %. Links: its own profiles of
# All-to-Alls range from the data sheet's rate to a third of it, and its iterations do not tell.
_COMPUTE_SPREAD = (0.9, 1.1)
_LINK_SPREAD = (1.0, 3.0)


def rates_of(cluster: Cluster, bytes_per_element: int) -> Rates:
    """Return the rates that a cluster's file gives.

    A GEMM of one token reads all weights once, for two FLOPs each, so its speed tells the memory's.
    """
    tokens, speed = cluster.gemm.points[0]
    return Rates(
        gemm=cluster.gemm,
        backward_factor=1.0,
        memory_bytes_per_s=speed / tokens * bytes_per_element / 2,
        intra=cluster.intra,
        inter=cluster.inter,
    )


def rate_sets(cluster: Cluster, bytes_per_element: int) -> tuple[Rates, ...]:
    """Return the rates of a cluster, then those with compute and links at either end of theirs.

    Four corners and not two, since what hides behind compute shows where compute is fast and links
    are slow.
    """
    rates = rates_of(cluster, bytes_per_element)
    corners = (
        rates.scaled(compute, links) for compute in _COMPUTE_SPREAD for links in _LINK_SPREAD
    )
    return rates, *corners
