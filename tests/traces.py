"""Small traces of every format for tests."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from megatron_laer.releases import ROUTING_TRACES
from megatron_laer.telemetry.trace_file import TraceWriter
from tests.releases import installed_release


def some_counts(seed, steps=3, layers=2, microbatches=2, ranks=2, experts=4, most=300):
    """Return int64 [steps, layers, microbatches, ranks, experts]."""
    shape = (steps, layers, microbatches, ranks, experts)
    return np.random.default_rng(seed).integers(0, most, shape)


def write_recording(path, counts, first_step=0, layers=None):
    names = layers or [f"decoder.{layer}" for layer in range(counts.shape[1])]
    writer = TraceWriter(path, counts.shape[3], counts.shape[4], names, first_step)
    for step, layer, microbatch in np.ndindex(counts.shape[:3]):
        writer.append(first_step + step, layer, microbatch, counts[step, layer, microbatch])
    writer.close()


def write_smartmoe(folder, counts):
    folder.mkdir(exist_ok=True)
    for step, rank in np.ndindex(counts.shape[0], counts.shape[3]):
        lines = [
            f"{layer}:{json.dumps(counts[step, layer, :, rank].astype(float).tolist())}\n"
            for layer in range(counts.shape[1])
        ]
        (folder / f"table_iter{step}_rank{rank}.log").write_text("".join(lines))


def write_npz(path, counts, compressed=True, **more):
    tokens = np.ascontiguousarray(counts.transpose(0, 1, 3, 2, 4).astype(np.int16))
    (np.savez_compressed if compressed else np.savez)(path, tokens=tokens, **more)


def write_csv(path, counts, is_wide):
    experts = counts.shape[4]
    keys = "step,layer,microbatch,source_rank"
    lines = [
        f"{keys}," + ",".join(f"expert_{e}" for e in range(experts))
        if is_wide
        else f"{keys},expert,tokens"
    ]
    for key in np.ndindex(counts.shape[:4]):
        start = ",".join(map(str, key))
        if is_wide:
            lines.append(start + "," + ",".join(map(str, counts[key])))
        else:
            lines += [f"{start},{e},{counts[key][e]}" for e in range(experts)]
    path.write_text("\n".join(lines) + "\n")


def megatrons_tracer():
    if installed_release() in ROUTING_TRACES.lacked_by():
        pytest.skip(f"Megatron {installed_release()} writes no traces")
    from megatron.core.transformer.moe.router_trace import RouterTracer

    return RouterTracer


def write_megatron(folder, counts, topk=1, training_mode=True):
    """Write by Megatron's own tracer and hooks, from tokens that give these counts with top-1."""
    torch = pytest.importorskip("torch")
    tracer_type = megatrons_tracer()
    steps, layers, microbatches, ranks, experts = counts.shape
    for rank in range(ranks):
        tracer = tracer_type(str(folder), steps, rank, training_mode=training_mode)
        hooks = [tracer.make_hook(f"decoder.layers.{layer}.mlp.router") for layer in range(layers)]
        for step in range(steps):
            for microbatch, layer in np.ndindex(microbatches, layers):
                chosen = np.repeat(np.arange(experts), counts[step, layer, microbatch, rank])
                routing_map = torch.zeros(len(chosen), experts, dtype=torch.bool)
                routing_map[torch.arange(len(chosen)), torch.from_numpy(chosen)] = True
                router = SimpleNamespace(topk=topk)
                # It asks CUDA, which is not there.
                with mock.patch("torch.cuda.is_current_stream_capturing", return_value=False):
                    hooks[layer](router, (), (routing_map.float(), routing_map))
            tracer.advance_step(step)
        tracer.flush()


def assert_holds(trace, counts, steps=None):
    steps = range(len(counts)) if steps is None else steps
    expected = [(steps[i], layer, mb) for i, layer, mb in np.ndindex(counts.shape[:3])]
    assert list(zip(trace.step_R, trace.layer_R, trace.microbatch_R, strict=True)) == expected
    np.testing.assert_array_equal(trace.counts_RNE, counts.reshape(-1, *counts.shape[3:]))
