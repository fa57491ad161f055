"""Compares predictions with published step times of stock Megatron on GPUs.

    python -m benchmarks.published_recipes --json OUT

All runs are in bf16 under forced balance. The constant of a layer's host time in the GPU clusters
follows from the first two rows, so these do not test it. Nothing else was fitted, but the times
were known when the prices were written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import print_table
from benchmarks.simulated import simulated
from megatron_laer.files.shipped import yaml_file
from megatron_laer.tools.simulator.iteration.methods import STOCK

# Relative difference from which on a pair of times is expected in order.
_APART = 0.05
SUMMARY = "Megatron-Bridge, docs/performance-summary.md"
MODEL_ZOO = "Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md"
GPT_OSS_120B, QWEN3_235B = "gpt-oss-120b", "qwen3-235b-a22b"


@dataclass(frozen=True)
class Recipe:
    """One published run; `seconds` are of a step, `sequences` its global batch."""

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

    @property
    def name(self) -> str:
        parallel = f"EP{self.expert} TP{self.tensor} PP{self.pipeline}x{self.chunks}"
        return f"{self.model} {self.cluster} {parallel} MBS{self.micro_batch} {self.flags}".strip()

    def words(self, model: str) -> list[str]:
        """Return the words of `simulate`, which counts a stage's ranks."""
        stage = self.gpus // self.pipeline
        sizes = {
            "--ranks": self.expert,
            "--world": stage,
            "--stock-expert-parallel": self.expert,
            "--tensor-parallel": self.tensor,
            "--pipeline": self.pipeline,
            "--virtual-pipeline": self.chunks,
            "--microbatches": self.sequences * self.tensor // (stage * self.micro_batch),
            "--tokens": _SEQUENCE * self.micro_batch // self.tensor,
        }
        given = [word for flag, size in sizes.items() for word in (flag, str(size))]
        inputs = ["--workload", "W0", "--model", model, "--cluster", self.cluster]
        return [*inputs, *given, "--method", STOCK, "--steps", "1", *self.flags.split()]


_SEQUENCE = 4096


def _per_step(tokens_per_s: float, gpus: int, sequences: int) -> float:
    return sequences * _SEQUENCE / gpus / tokens_per_s


_LAYERS_COUNT = "--account-for-embedding --account-for-loss"
_QWEN = MODEL_ZOO, QWEN3_235B, "h100-8", 256
_OSS_H100 = SUMMARY, GPT_OSS_120B, "h100-8", 64
_OSS_B200 = SUMMARY, GPT_OSS_120B, "b200-8", 64
RECIPES = (
    Recipe(*_OSS_H100, 1, 8, 4, 1, 4, 512, _per_step(5630, 64, 512), is_fitted=True),
    Recipe(*_OSS_H100, 1, 8, 4, 1, 1, 1280, _per_step(5993, 64, 1280), is_fitted=True),
    Recipe(*_OSS_B200, 1, 8, 1, 1, 4, 512, _per_step(8213, 64, 512)),
    Recipe(*_OSS_B200, 1, 64, 1, 1, 4, 1280, _per_step(8047, 64, 1280)),
    Recipe(*_QWEN, 2, 32, 8, 4, 1, 2048, 19.7, _LAYERS_COUNT),
    Recipe(*_QWEN, 2, 32, 8, 4, 1, 2048, 17.6, f"{_LAYERS_COUNT} --stock-overlap"),
    Recipe(*_QWEN, 4, 8, 8, 4, 1, 2048, 29.0, _LAYERS_COUNT),
    Recipe(*_QWEN, 2, 8, 32, 3, 1, 2048, 24.2, f"{_LAYERS_COUNT} --stock-dispatcher alltoall"),
    Recipe(*_QWEN, 2, 8, 1, 1, 4, 2048, 17.6, "--recompute full"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.published_recipes", __doc__)
    add_json(parser)
    options = parser.parse_args(arguments)
    with gpt_oss_120b() as larger:
        rows = [
            _compared(recipe, larger if recipe.model == GPT_OSS_120B else recipe.model)
            for recipe in RECIPES
        ]
    print_table([{key: row[key] for key in row if key != "source"} for row in rows])
    unseen = [row for row in rows if not row["fitted"]]
    errors = [abs(row["error"]) for row in unseen]
    inside = sum(row["low_s"] <= row["measured_s"] <= row["high_s"] for row in unseen)
    print(f"mean error {sum(errors) / len(errors):.1%} of {len(unseen)}, {inside} in their range")
    right, pairs = 0, 0
    for one, other in combinations([row for row in unseen if QWEN3_235B in row["recipe"]], 2):
        first, second = one["measured_s"], other["measured_s"]
        if abs(first - second) > _APART * min(first, second):
            pairs += 1
            right += (first < second) == (one["predicted_s"] < other["predicted_s"])
    print(f"{right} of {pairs} pairs of Qwen3-235B are in the right order")
    write_json(options.json, {"recipes": rows})
    return 0


@contextlib.contextmanager
def gpt_oss_120b() -> Iterator[str]:
    """Write the model, gpt-oss-20b with more layers and experts, to a file; yield its path."""
    content = yaml.safe_load(yaml_file("model", "gpt-oss-20b").read_text(encoding="utf-8"))
    content["architecture"]["num-layers"] = 36
    content["moe"]["num-experts"] = 128
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{GPT_OSS_120B}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        yield str(path)


def _compared(recipe: Recipe, model: str) -> dict[str, Any]:
    (case,) = simulated(recipe.words(model))
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
