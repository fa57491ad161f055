"""Compares predictions with published step times of stock Megatron on GPUs.

    python -m benchmarks.published_recipes --json OUT

All runs are in bf16 under forced balance. One constant, the host's time for an operation, follows
from the row that is marked as fitted, in which the host is slower than the device.
Nothing else was fitted, but the times were known when the prices were written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import print_table
from benchmarks.simulated import simulated
from megatron_laer.files.shipped import yaml_file
from megatron_laer.tools.simulator.iteration.methods import STOCK
from megatron_laer.tools.simulator.iteration.model_shape import read_model

# Relative difference from which on a pair of times is expected in order.
_APART = 0.05
SUMMARY = "Megatron-Bridge, docs/performance-summary.md"
MODEL_ZOO = "Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md"
GPT_OSS_120B, QWEN3_235B = "gpt-oss-120b", "qwen3-235b-a22b"


@dataclass(frozen=True)
class Recipe:
    """One published run; `seconds` are of a step, `sequences` its global batch.

    Sequences are of `length` tokens, each on `context` ranks, whose exchanges are not simulated.
    """

    source: str
    model: str
    cluster: str
    gpus: int
    tensor: int
    expert: int
    pipeline: int
    chunks: int
    micro_batch: int
    sequences: int
    seconds: float
    flags: str = ""
    is_fitted: bool = False
    length: int = 4096
    context: int = 1

    @property
    def name(self) -> str:
        parallel = f"EP{self.expert} TP{self.tensor} PP{self.pipeline}x{self.chunks}"
        size = f"{self.length // 1024}k MBS{self.micro_batch}"
        return f"{self.model} {self.cluster} {parallel} {size} {self.flags}".strip()

    def words(self, model: str) -> list[str]:
        """Return the words of `simulate`, which counts a stage's ranks."""
        stage, shared = self.gpus // self.pipeline, self.tensor * self.context
        sizes = {
            "--ranks": self.expert,
            "--world": stage,
            "--stock-expert-parallel": self.expert,
            "--tensor-parallel": self.tensor,
            "--pipeline": self.pipeline,
            "--virtual-pipeline": self.chunks,
            "--microbatches": self.sequences * shared // (stage * self.micro_batch),
            "--tokens": self.length * self.micro_batch // shared,
        }
        given = [word for flag, size in sizes.items() for word in (flag, str(size))]
        inputs = ["--workload", "W0", "--model", model, "--cluster", self.cluster]
        return [*inputs, *given, "--method", STOCK, "--steps", "1", *self.flags.split()]


def _per_step(tokens_per_s: float, gpus: int, sequences: int) -> float:
    return sequences * 4096 / gpus / tokens_per_s


def _long(length: int, context: int, tflops: float) -> Recipe:
    """Return a run with long sequences, of which the model's FLOPs per second are published."""
    model = replace(read_model(QWEN3_235B), sequence=length)
    flops = 3 * model.flops_per_token * 256 * length
    seconds = flops / (256 * tflops * 1e12)
    flags = f"{_LAYERS_COUNT} --recompute moe"
    return Recipe(*(*_QWEN, 4, 8, 8, 4, 1, 256, seconds, flags), length=length, context=context)


_LAYERS_COUNT = "--account-for-embedding --account-for-loss"
_QWEN = MODEL_ZOO, QWEN3_235B, "h100-8", 256
_OSS_H100 = SUMMARY, GPT_OSS_120B, "h100-8", 64
_OSS_B200 = SUMMARY, GPT_OSS_120B, "b200-8", 64
RECIPES = (
    Recipe(*_OSS_H100, 1, 8, 4, 1, 4, 512, _per_step(5630, 64, 512)),
    Recipe(*_OSS_H100, 1, 8, 4, 1, 1, 1280, _per_step(5993, 64, 1280)),
    Recipe(*_OSS_B200, 1, 8, 1, 1, 4, 512, _per_step(8213, 64, 512)),
    Recipe(*_OSS_B200, 1, 64, 1, 1, 4, 1280, _per_step(8047, 64, 1280)),
    Recipe(*_QWEN, 2, 32, 8, 4, 1, 2048, 19.7, _LAYERS_COUNT),
    Recipe(*_QWEN, 2, 32, 8, 4, 1, 2048, 17.6, f"{_LAYERS_COUNT} --overlap"),
    Recipe(*_QWEN, 4, 8, 8, 4, 1, 2048, 29.0, _LAYERS_COUNT, is_fitted=True),
    Recipe(*_QWEN, 2, 8, 32, 3, 1, 2048, 24.2, f"{_LAYERS_COUNT} --stock-dispatcher alltoall"),
    Recipe(*_QWEN, 2, 8, 1, 1, 4, 2048, 17.6, "--recompute full"),
    *starmap(_long, ((2**14, 1, 295), (2**15, 2, 335), (2**16, 4, 368), (2**17, 8, 389))),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.published_recipes", __doc__)
    add_json(parser)
    options = parser.parse_args(arguments)
    rows = [_compared(recipe) for recipe in RECIPES]
    print_table([{key: row[key] for key in row if key != "source"} for row in rows])
    unseen = [row for row in rows if not row["fitted"]]
    errors = [abs(row["error"]) for row in unseen]
    inside = sum(row["low_s"] <= row["measured_s"] <= row["high_s"] for row in unseen)
    print(f"mean error {sum(errors) / len(errors):.1%} of {len(unseen)}, {inside} in their range")
    right, pairs = 0, 0
    short = [row for row in rows if QWEN3_235B in row["recipe"] and " 4k " in row["recipe"]]
    for one, other in combinations(short, 2):
        first, second = one["measured_s"], other["measured_s"]
        if abs(first - second) > _APART * min(first, second):
            pairs += 1
            right += (first < second) == (one["predicted_s"] < other["predicted_s"])
    print(f"{right} of {pairs} pairs of Qwen3-235B with 4k are in the right order")
    write_json(options.json, {"recipes": rows})
    return 0


@contextlib.contextmanager
def model_file(name: str, length: int) -> Iterator[str]:
    """Write a model with this length of sequences to a file, and yield its path.

    gpt-oss-120b is gpt-oss-20b with more layers and experts.
    """
    is_larger = name == GPT_OSS_120B
    base = yaml_file("model", "gpt-oss-20b" if is_larger else name)
    content = yaml.safe_load(base.read_text(encoding="utf-8"))
    content["architecture"]["seq-length"] = length
    if is_larger:
        content["architecture"]["num-layers"] = 36
        content["moe"]["num-experts"] = 128
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        yield str(path)


def _compared(recipe: Recipe) -> dict[str, Any]:
    with model_file(recipe.model, recipe.length) as model:
        case = simulated(recipe.words(model))
    found = case["methods"][STOCK]["iteration_s"]
    return {
        "recipe": recipe.name,
        "measured_s": recipe.seconds,
        "predicted_s": found["value"],
        "low_s": found["low"],
        "high_s": found["high"],
        "error": found["value"] / recipe.seconds - 1,
        "gib": case["methods"][STOCK]["peak_bytes"] / 2**30,
        "fitted": recipe.is_fitted,
        "source": recipe.source,
    }


if __name__ == "__main__":
    program("benchmarks.published_recipes", main)
