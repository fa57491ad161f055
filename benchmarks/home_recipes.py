"""Simulates recipes under many routings: `python -m benchmarks.home_recipes --json OUT`.

Shares are of stock's time for the same recipe and schedule under balanced routing (W0), with the
constants of `h100-8`. The schedules are Megatron's own and its combined 1F1B, with which it refuses
full recompute. Stock's group is the recipe's; FSEP has training's own sharding, slots and exchange.
Both send tokens once per node (flex). Points are hundredths of FSEP's time by which a cause takes
longer than in stock under balanced routing; they add up to what its share lacks. Nothing here was
measured. `--before` names a checkout of another commit, with its native core built, for a column.

Parallel sizes of the first recipe are Megatron-Bridge's for Qwen3-235B on H100s; the others vary
models, tensor parallelism and pipelines. T, a rank's tokens in a microbatch, is the sequence times
the micro-batch over tensor parallelism. Microbatches are twice the pipeline's stages, four without.
A stage has at least 32 ranks, among which optimizer states are sharded. GiB is the most that FSEP
needs of a card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.command_line import add_json, checkout, parser_of, program, write_json
from benchmarks.report import machine, print_table
from benchmarks.simulated import simulated
from megatron_laer.tools.simulator.iteration.methods import FSEP, STOCK

CLUSTER = "h100-8"
BALANCED = "W0"
WORKLOADS = ("W1", "W2", "W5", "W6", "W7", "natural", BALANCED)
SCHEDULES = {"1F1B": "", "combined": "--overlap"}
FEWEST_RANKS = 32
# Lost points are shown by these kinds of the simulator's, and the others together.
CAUSES = ("gate", "tokens", "waiting", "experts", "attention", "dense", "pipeline")
CAUSES += ("restore", "reduce", "host")


@dataclass(frozen=True)
class Recipe:
    """One recipe: its name, its number of ranks, and flags of `simulate`."""

    name: str
    ranks: int
    flags: str

    @property
    def words(self) -> list[str]:
        world = max(self.ranks, FEWEST_RANKS)
        group = ["--stock-expert-parallel", str(self.ranks)]
        return ["--ranks", str(self.ranks), "--world", str(world), *group, *self.flags.split()]


RECIPES = (
    Recipe(
        "Qwen3-235B EP32 TP2 PP8x4, T 2048",
        32,
        "--model qwen3-235b-a22b --tensor-parallel 2 --tokens 2048 --pipeline 8 "
        "--virtual-pipeline 4 --microbatches 16",
    ),
    Recipe(
        "Qwen3-235B EP8 TP4 PP8x4, T 1024",
        8,
        "--model qwen3-235b-a22b --tensor-parallel 4 --tokens 1024 --pipeline 8 "
        "--virtual-pipeline 4 --microbatches 16",
    ),
    Recipe(
        "DeepSeek-V3 EP64 TP2 PP8x4, T 2048",
        64,
        "--model deepseek-v3 --tensor-parallel 2 --tokens 2048 --pipeline 8 --virtual-pipeline 4 "
        "--microbatches 16",
    ),
    Recipe(
        "Mixtral-8x7B EP8 PP4x8, T 4096",
        8,
        "--model mixtral-8x7b-e8k2 --tokens 4096 --pipeline 4 --virtual-pipeline 8 "
        "--microbatches 8",
    ),
    Recipe(
        "Qwen3-30B EP8 PP2x24, T 8192",
        8,
        "--model qwen3-30b-a3b --tokens 8192 --pipeline 2 --virtual-pipeline 24 --microbatches 4",
    ),
    Recipe(
        "Qwen3-30B EP8, T 4096",
        8,
        "--model qwen3-30b-a3b --tokens 4096 --microbatches 4",
    ),
    Recipe(
        "Qwen3-235B EP8 PP8x4, T 8192, full recompute",
        8,
        "--model qwen3-235b-a22b --tokens 8192 --pipeline 8 --virtual-pipeline 4 "
        "--microbatches 16 --recompute full",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.home_recipes", __doc__)
    parser.add_argument("--before", type=checkout, help="a checkout of another commit")
    parser.add_argument("--recipes", nargs="+", metavar="WORD", help="with this in their names")
    add_json(parser)
    options = parser.parse_args(arguments)
    words = options.recipes or [""]
    recipes = [recipe for recipe in RECIPES if any(word in recipe.name for word in words)]
    if not recipes:
        names = "; ".join(recipe.name for recipe in RECIPES)
        raise ValueError(f"--recipes {' '.join(words)}: no recipe has it; recipes are {names}")
    before = [] if options.before is None else _rows_of(options.before, words)
    shares = {(row["recipe"], row["schedule"], row["routing"]): row["share"] for row in before}
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        of_recipe = list(_rows(recipe))
        rows += of_recipe
        for row in of_recipe:
            if shares:
                row["before"] = shares[row["recipe"], row["schedule"], row["routing"]]
        print(recipe.name)
        print_table([_shown(row) for row in of_recipe])
    write_json(options.json, {"machine": machine(), "cluster": CLUSTER, "recipes": rows})
    return 0


def _rows(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield the shares of a recipe, with the points that FSEP loses by cause."""
    for schedule, flags in SCHEDULES.items():
        if flags and "--recompute full" in recipe.flags:
            continue
        words = [*recipe.words, *flags.split()]
        case = _simulated(words, BALANCED, STOCK)
        balanced = case["methods"][STOCK]
        for workload in WORKLOADS:
            case = _simulated(words, workload, STOCK, FSEP)
            stock, ours = (case["methods"][name] for name in (STOCK, FSEP))
            yield {
                "recipe": recipe.name,
                "schedule": schedule,
                "routing": workload,
                "stock": _seconds(balanced) / _seconds(stock),
                "share": _seconds(balanced) / _seconds(ours),
                "chosen": f"{case['sharding']} C={case['capacity']}",
                "max/mean": ours["max_over_mean"],
                "GiB": ours["peak_bytes"] / 2**30,
                "points": _points(ours, balanced),
            }


def _points(ours: dict[str, Any], balanced: dict[str, Any]) -> dict[str, float]:
    spent, least = (
        {**of["compute_s"], **of["exposed_s"], "waiting": of["waiting_s"]}
        for of in (ours, balanced)
    )
    lost = {kind: 100 * (spent[kind] - least[kind]) / _seconds(ours) for kind in spent}
    return {kind: lost.pop(kind) for kind in CAUSES} | {"rest": sum(lost.values())}


def _seconds(found: dict[str, Any]) -> float:
    return float(found["iteration_s"]["value"])


def _simulated(words: Sequence[str], workload: str, *methods: str) -> dict[str, Any]:
    inputs = ["--workload", workload, "--cluster", CLUSTER, "--method", *methods]
    recompute = [] if "--recompute" in words else ["--recompute", "compute"]
    tokens = ["--token-exchange", "flex"]
    return simulated([*inputs, *recompute, *tokens, *words], ranges=False)


def _rows_of(folder: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of another checkout, by its package and this file."""
    with TemporaryDirectory() as kept:
        path = Path(kept) / "before.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--recipes", *words]
        command += ["--json", str(path)]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        subprocess.run(command, env=environment, cwd=folder, check=True)
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["recipes"]
    return rows


def _shown(row: dict[str, Any]) -> dict[str, str]:
    shown = {key: row[key] for key in row if key not in ("recipe", "points")} | row["points"]
    digits = dict.fromkeys(("GiB", *row["points"]), 1)
    return {
        key: f"{value:.{digits.get(key, 3)}f}" if isinstance(value, float) else value
        for key, value in shown.items()
    }


if __name__ == "__main__":
    program("benchmarks.home_recipes", main)
