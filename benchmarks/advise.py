"""Asks `advise` for six models on 8 to 256 GPUs: `python -m benchmarks.advise --json OUT`.

Each run has the first shape of a list that fits some setting: more recompute, tensor parallelism
and stages. A table has the choice, the best stock, the share of forced balance and the memory.
`check-recipe` then judges every line of flags with the model's. With `--sweep`, `simulate` predicts
all slots, shardings, exchanges and restores of some runs in each group, and none may be faster by
over 1 %. Nothing here was measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, print_table
from megatron_laer.choices import Sharding
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.tools import cli
from megatron_laer.tools.recipes.verdict import Verdict
from megatron_laer.tools.simulator.iteration.methods import FSEP
from megatron_laer.tools.traces.workloads import NATURAL

CLUSTERS = ("a100-4x8-ib800", "h100-8")
GPUS = (8, 32, 64, 256)
MODELS = (
    *("mixtral-8x7b-e8k2", "mixtral-8x22b-e8k2", "mixtral-8x22b-e16k4"),
    *("qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"),
)
TOKENS, MICROBATCHES = 8192, 16
# Shapes that are tried in this order: recompute, tensor parallelism, stages.
SHAPES = (
    ("none", 1, 1),
    ("full", 1, 1),
    ("full", 1, 4),
    ("full", 2, 8),
    ("full", 4, 16),
)
# Runs whose choice is compared with a sweep: model, GPUs.
SWEPT = (("mixtral-8x7b-e8k2", 32), ("qwen3-30b-a3b", 32), ("mixtral-8x22b-e16k4", 64))
NEAR = 1.01
_GIB = 2**30


@dataclass(frozen=True)
class Asked:
    """One run with its shape, and its advice as JSON."""

    model: str
    cluster: str
    gpus: int
    shape: tuple[str, int, int]
    advice: dict[str, Any]
    cpu_s: float

    @property
    def words(self) -> list[str]:
        return [*_run_words(self.model, self.cluster, self.shape), "--gpus", str(self.gpus)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.advise", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, choices=GPUS, default=list(GPUS))
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--workload", default=None, help="default: that of advise")
    parser.add_argument("--sweep", action="store_true", help="compare with sweeps of simulate")
    add_json(parser)
    options = parser.parse_args(arguments)
    routing = [] if options.workload is None else ["--workload", options.workload]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            flags = shlex.split(said(["flags", model])[1])
            for cluster in options.clusters:
                for gpus in options.gpus:
                    asked = ask(model, cluster, gpus, routing, Path(folder))
                    row = shown(asked) | {"judged": judged(asked, flags)}
                    is_swept = options.sweep and (model, gpus) in SWEPT
                    row["sweep"] = swept(asked, routing, Path(folder)) if is_swept else "-"
                    print(*row.values(), sep="  ", flush=True)
                    rows.append(row | {"advice": asked.advice})
    print_table([{key: row[key] for key in row if key != "advice"} for row in rows])
    write_json(options.json, {"machine": machine(), "runs": rows})
    return 0


def ask(model: str, cluster: str, gpus: int, routing: Sequence[str], folder: Path) -> Asked:
    """Return the advice for the first shape in which anything fits, else for the last one."""
    path = folder / "advice.json"
    began_s = time.process_time()
    asked = None
    for shape in _shapes(gpus):
        began_s = time.process_time()
        words = ["advise", *_run_words(model, cluster, shape), *routing]
        said([*words, "--gpus", str(gpus), "--json", str(path)], statuses=(0, 1))
        advice = json.loads(path.read_text(encoding="utf-8"))
        asked = Asked(model, cluster, gpus, shape, advice, time.process_time() - began_s)
        if advice["best"] and advice["stock"]:
            break
    assert asked is not None
    return asked


def _shapes(gpus: int) -> Iterator[tuple[str, int, int]]:
    return (shape for shape in SHAPES if shape[1] * shape[2] * 2 <= gpus)


def _run_words(model: str, cluster: str, shape: tuple[str, int, int]) -> list[str]:
    recompute, tensor, stages = shape
    sizes = f"--tokens {TOKENS // tensor} --microbatches {max(MICROBATCHES, 2 * stages)}"
    parallel = f"--tensor-parallel {tensor} --pipeline {stages} --recompute {recompute}"
    return ["--model", model, "--cluster", cluster, *sizes.split(), *parallel.split()]


def shown(asked: Asked) -> dict[str, Any]:
    advice = asked.advice
    recompute, tensor, stages = asked.shape
    row: dict[str, Any] = {
        "model": asked.model,
        "GPUs": f"{asked.gpus} {asked.cluster.split('-')[0]}",
        "shape": f"TP{tensor} PP{stages} {recompute}",
    }
    best = advice["best"][0] if advice["best"] else None
    stock = advice["stock"][0] if advice["stock"] else None
    row["take"] = ("FSEP" if advice["takes_fsep"] else "stock") if best or stock else "nothing"
    row["FSEP"] = best["label"] if best else "-"
    row["share"] = f"{best['share']:.3f}" if best else "-"
    row["GiB"] = f"{best['peak_bytes'] / _GIB:.1f}" if best else "-"
    row["stock"] = stock["label"].removeprefix("stock ") if stock else "-"
    row["stock's share"] = f"{stock['share']:.3f}" if stock else "-"
    row["stock's GiB"] = f"{stock['peak_bytes'] / _GIB:.1f}" if stock else "-"
    decides = advice["decides"]
    turns = decides is not None and (decides["reverses"] or decides["loss"] > NEAR)
    row["decides"] = decides["constant"] if turns else "-"
    return row | {"processor s": f"{asked.cpu_s:.0f}"}


def judged(asked: Asked, model_flags: Sequence[str]) -> str:
    """Let `check-recipe` judge each line of FSEP's flags, and return how many run."""
    lines = [found["flags"] for found in asked.advice["best"]]
    for line in lines:
        words = ["check-recipe", "--", *model_flags, *shlex.split(line)]
        _, text = said(words)
        if not text.startswith(Verdict.RUNS):
            raise RuntimeError(f"{line}: {text}")
    return f"{len(lines)} run"


def swept(asked: Asked, routing: Sequence[str], folder: Path) -> str:
    """Return the choice's time over the fastest case of a sweep that fits."""
    fastest = min(_cases(asked, routing, folder), default=None)
    if fastest is None:
        return "nothing fits"
    ratio = asked.advice["best"][0]["iteration_s"]["value"] / fastest
    if ratio > NEAR:
        raise RuntimeError(f"{' '.join(asked.words)}: the choice takes {ratio:.4f} of the sweep's")
    return f"{ratio:.4f}"


def _cases(asked: Asked, routing: Sequence[str], folder: Path) -> Iterator[float]:
    """Yield the seconds of all slots, exchanges and restores in each group that fit in memory."""
    path = folder / "sweep.json"
    experts = int(_value(said(["flags", asked.model])[1], "--num-experts"))
    ranks, most = asked.gpus // asked.shape[2], _most_bytes(asked.cluster)
    for size in (size for size in range(2, ranks + 1) if ranks % size == 0):
        if size % asked.shape[1]:
            continue
        for sharding in Sharding:
            fewest = -(-experts // size) + (sharding == Sharding.EXPERTS)
            if sharding == Sharding.EXPERTS and experts % size:
                continue
            slots = [each for each in range(fewest, fewest + 5) if each <= experts]
            words = ["simulate", *_run_words(asked.model, asked.cluster, asked.shape)]
            words += [*(routing or ["--workload", NATURAL]), "--method", FSEP, "--steps", "1"]
            words += ["--ranks", str(size), "--world", str(ranks), "--sharding", sharding.value]
            words += ["--capacity", *map(str, slots), "--json", str(path)]
            for tokens in ("rank", "node", "flex"):
                for kept in ("--restore layer", "--restore step --mode forecast"):
                    said([*words, "--token-exchange", tokens, *kept.split()])
                    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
                    for case in (case["methods"][FSEP] for case in cases):
                        if case["peak_bytes"] <= most:
                            yield case["iteration_s"]["value"]


def _most_bytes(cluster: str) -> float:
    card = load_cluster(cluster).card
    assert card is not None
    return card.memory_gib * _GIB


def _value(text: str, flag: str) -> str:
    words = shlex.split(text)
    return words[words.index(flag) + 1]


def said(words: Sequence[str], statuses: Sequence[int] = (0,)) -> tuple[int, str]:
    """Run a command, and return its status and output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main(list(words))
    if status not in statuses:
        raise RuntimeError(f"{shlex.join(words)}: status {status}: {out.getvalue()}")
    return status, out.getvalue()


if __name__ == "__main__":
    program("benchmarks.advise", main)
