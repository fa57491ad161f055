"""Small routing traces for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.telemetry.trace_file import TraceWriter


def some_counts(seed, steps=3, layers=2, microbatches=2, ranks=2, experts=4, most=300):
    """Return int64 [steps, layers, microbatches, ranks, experts]."""
    shape = (steps, layers, microbatches, ranks, experts)
    return np.random.default_rng(seed).integers(0, most, shape)


def write_recording(path: Path, counts: Int64, first_step: int = 0) -> None:
    names = [f"decoder.{layer}" for layer in range(counts.shape[1])]
    sizes = counts.shape[3], counts.shape[4]
    writer = TraceWriter(path, *sizes, names, first_step, "0123456789abcdef")
    for step, layer, microbatch in np.ndindex(counts.shape[:3]):
        writer.append(first_step + step, layer, microbatch, counts[step, layer, microbatch])
    writer.close()


def assert_holds(trace, counts):
    expected = [*np.ndindex(counts.shape[:3])]
    assert list(zip(trace.step_R, trace.layer_R, trace.microbatch_R, strict=True)) == expected
    np.testing.assert_array_equal(trace.counts_RNE, counts.reshape(-1, *counts.shape[3:]))


def pairs_of(expert_TK: Int64, experts: int) -> Int64:
    """Count the tokens that chose both of two experts."""
    chosen_TE = np.zeros((len(expert_TK), experts), dtype=np.int64)
    np.put_along_axis(chosen_TE, expert_TK, 1, axis=1)
    return chosen_TE.T @ chosen_TE
