"""Measures time and memory of a large simulation: `python -m benchmarks.simulation_speed --help`.

A trace is drawn whose experts' popularity differs by layer, step and rank, with every layer and
microbatch of its own; then `simulate` runs on it, as the command does, with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a file

from benchmarks.report import machine

_STEPS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the trace, run the command, and print what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--microbatches", type=int, default=20)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank in a microbatch")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--recorded-ranks", type=int, default=64, help="the others are dealt out")
    parser.add_argument("--method", nargs="+", default=["stock", "fsep"])
    parser.add_argument("--mode", default="forecast", help="one plan per layer and step")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        trace, model = Path(scratch) / "trace.npz", Path(scratch) / "model.yaml"
        np.savez(trace, tokens=_tokens(options))
        model.write_text(_model(options))
        words = f"-m megatron_laer simulate {trace} --model {model} --steps 1 --node-size 8"
        words += f" --ranks {options.ranks} --mode {options.mode} --cluster h100-8 --method"
        begin_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, *words.split(), *options.method],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        wall_s = time.monotonic() - begin_s
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "wall_s": wall_s,
        "processor_s": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
        "sizes": {
            name: getattr(options, name)
            for name in ("ranks", "layers", "microbatches", "experts", "topk", "method", "mode")
        },
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return done.returncode


def _tokens(options: argparse.Namespace) -> np.ndarray:
    """Draw counts, [steps, layers, ranks, microbatches, experts]; recorded ranks stand for more."""
    rng = np.random.default_rng(0)
    pairs = options.tokens * options.topk * options.ranks // options.recorded_ranks
    popularity = rng.gamma(2.0, size=(options.layers, options.experts))
    shape = (_STEPS, options.layers, options.recorded_ranks, options.microbatches)
    found = np.empty((*shape, options.experts), dtype=np.int32)
    for step, layer in np.ndindex(*shape[:2]):
        shares = popularity[layer] * rng.uniform(0.8, 1.25, (*shape[2:], options.experts))
        shares /= shares.sum(axis=-1, keepdims=True)
        found[step, layer] = rng.multinomial(pairs, shares)
    return found


def _model(options: argparse.Namespace) -> str:
    return (
        "description: of the size of Qwen3-235B-A22B\n"
        f"architecture:\n  num-layers: {options.layers}\n  hidden-size: 4096\n"
        "  ffn-hidden-size: 12288\n  num-attention-heads: 64\n  kv-channels: 128\n"
        "  group-query-attention: true\n  num-query-groups: 4\n  seq-length: 4096\n  swiglu: true\n"
        f"moe:\n  num-experts: {options.experts}\n  moe-router-topk: {options.topk}\n"
        "  moe-ffn-hidden-size: 1536\nprecision:\n  bf16: true\ndata:\n  vocab-size: 151936\n"
    )


if __name__ == "__main__":
    sys.exit(main())
