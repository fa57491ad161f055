"""Cost models by which tests compare layouts."""

from __future__ import annotations

import math
from typing import Any

from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster, HostTime, Link, SolveTime
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.gemm_curve import GemmCurve


def make_costs(
    *,
    points: tuple[tuple[int, float], ...] = ((1, 1e10),),
    intra: Link | None = None,
    inter: Link | None = None,
    solve: SolveTime | None = None,
    host: HostTime | None = None,
    backward_gemm_factor: float = 1.0,
    memory_bytes_per_s: float = 1e24,
    **shape: Any,
) -> CostModel:
    """Make costs of a small expert on a made-up cluster; by default its speed is constant.

    Memory is so fast that packing takes no time.
    """
    cluster = Cluster(
        name="test",
        source="made up",
        assumed="everything",
        nodes=1,
        ranks_per_node=1,
        gemm=GemmCurve(points),
        gemm_fp8=GemmCurve(points).times(2.0),
        intra=intra or Link(3e11, 1e-6),
        inter=inter or Link(1.25e10, 2e-6),
        solve=solve or SolveTime(1e-6, 0.0, 0.0),
        host=host,
        backward_gemm_factor=backward_gemm_factor,
        memory_bytes_per_s=memory_bytes_per_s,
    )
    return CostModel(
        cluster, **{"hidden": 64, "ffn": 24, "gated": True, "bytes_per_element": 2, **shape}
    )


# Transfers take no time, so the cost is the largest load alone.
FREE = Link(math.inf, 0.0)
COMPUTE_ONLY = make_costs(intra=FREE, inter=FREE)
COSTS = CostModel(load_cluster("a100-4x8-ib800"), 4096, 14336, gated=True, bytes_per_element=2)
