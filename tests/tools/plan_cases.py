"""Routing trace and costs that tests of `plan` and of its simulator share."""

from __future__ import annotations

import numpy as np

from megatron_laer.planner.geometry import Geometry
from megatron_laer.telemetry.trace_file import TraceWriter
from megatron_laer.tools.simulator.comparison import MODES, simulate
from megatron_laer.tools.traces.records import Trace
from tests.costs import COSTS

STRATEGIES = ("static", "laer", "greedy")


def drifting_trace(steps=6, layers=2, microbatches=3, ranks=4, experts=8, seed=0):
    """Return skewed counts whose hot experts move slowly, and jump in the last step."""
    luck = np.random.default_rng(seed)
    popularity = luck.gamma(0.3, size=(layers, experts)) + 0.01
    counts = np.empty((steps, layers, microbatches, ranks, experts), dtype=np.int64)
    for step in range(steps):
        popularity *= luck.uniform(0.8, 1.25, popularity.shape)
        if step == steps - 1:
            popularity = popularity[:, ::-1].copy()
        for layer, microbatch, rank in np.ndindex(layers, microbatches, ranks):
            shares = popularity[layer] / popularity[layer].sum()
            counts[step, layer, microbatch, rank] = luck.multinomial(4096, shares)
    step_R, layer_R, microbatch_R = (
        axis.reshape(-1) for axis in np.indices(counts.shape[:3], dtype=np.int64)
    )
    names = tuple(f"decoder.{layer}" for layer in range(layers))
    flat = counts.reshape(-1, ranks, experts).astype(np.int32)
    return Trace(names, step_R, layer_R, microbatch_R, flat)


def table(trace, capacity=3, node_size=2, strategies=STRATEGIES, modes=MODES, **more):
    geometry = Geometry(trace.num_ranks, trace.num_experts, capacity, node_size)
    rows = simulate(trace, {geometry: COSTS}, strategies, modes, **more)
    return {(row.strategy, row.mode): row for row in rows}


def recording(path, trace):
    writer = TraceWriter(path, trace.num_ranks, trace.num_experts, trace.layers)
    for record in range(len(trace)):
        writer.append(
            int(trace.step_R[record]),
            int(trace.layer_R[record]),
            int(trace.microbatch_R[record]),
            trace.counts_NE(record),
        )
    writer.close()
    return path
