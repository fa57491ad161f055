"""Measures time and memory of a large simulation: `python -m benchmarks.simulation_speed --help`.

The trace is drawn with experts' popularity that differs by layer, step and rank; every layer and
microbatch has its own counts. Then `simulate` runs on it, as the command does, with one thread.
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

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine
from megatron_laer.files import memory
from megatron_laer.planner.guard import GUARD_MODES
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.telemetry.trace_file import TraceWriter, recording_path
from megatron_laer.tools.cli.argument_types import between
from megatron_laer.tools.simulator.iteration.methods import METHODS

_STEPS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the trace, run the command, and print its time and memory."""
    parser = parser_of("benchmarks.simulation_speed", __doc__)
    parser.add_argument("--ranks", type=between(1, 2**16), default=1024)
    parser.add_argument("--layers", type=between(1, 4096), default=60)
    parser.add_argument("--microbatches", type=between(1, 2**16), default=20)
    parser.add_argument("--experts", type=between(1, MAX_EXPERTS), default=128)
    parser.add_argument(
        "--tokens", type=between(1, 2**24), default=4096, help="of a rank in a microbatch"
    )
    parser.add_argument("--topk", type=between(1, MAX_EXPERTS), default=8)
    parser.add_argument(
        "--recorded-ranks", type=between(1, 2**16), default=64, help="the others are dealt out"
    )
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["stock", "fsep"])
    parser.add_argument(
        "--mode", choices=[*GUARD_MODES], default="forecast", help="default: one plan a step"
    )
    add_json(parser)
    options = parser.parse_args(arguments)
    _check(options)
    with tempfile.TemporaryDirectory() as scratch:
        trace, model = recording_path(scratch, 0), Path(scratch) / "model.yaml"
        _record(options, trace)
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
    write_json(options.json, result)
    return done.returncode


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for sizes that do not fit each other, or the memory."""
    if options.ranks % options.recorded_ranks != 0:
        raise ValueError(
            f"--ranks {options.ranks} is no multiple of --recorded-ranks {options.recorded_ranks}"
        )
    if options.topk > options.experts:
        raise ValueError(f"--topk {options.topk} is more than --experts {options.experts}")
    counts = _STEPS * options.layers * options.recorded_ranks * options.microbatches
    memory.check_enough(
        2 * 4 * counts * options.experts,  # read, and kept
        f"{counts} microbatches of {options.experts} experts",
        "give fewer --recorded-ranks, --layers or --microbatches",
    )


def _record(options: argparse.Namespace, path: Path) -> None:
    """Record drawn counts; recorded ranks stand for more."""
    names = [f"layer {layer + 1}" for layer in range(options.layers)]
    writer = TraceWriter(path, options.recorded_ranks, options.experts, names)
    rng = np.random.default_rng(0)
    pairs = options.tokens * options.topk * options.ranks // options.recorded_ranks
    popularity = rng.gamma(2.0, size=(options.layers, options.experts))
    shape = options.recorded_ranks, options.microbatches, options.experts
    for step, layer in np.ndindex(_STEPS, options.layers):
        shares = popularity[layer] * rng.uniform(0.8, 1.25, shape)
        shares /= shares.sum(axis=-1, keepdims=True)
        for microbatch, counts_NE in enumerate(rng.multinomial(pairs, shares).swapaxes(0, 1)):
            writer.append(step, layer, microbatch, counts_NE)
    writer.close()


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
    program("python -m benchmarks.simulation_speed", main)
