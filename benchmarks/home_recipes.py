"""Simulates recipes under both shardings: `python -m benchmarks.home_recipes --json OUT`.

Shares are of stock's time for the same recipe under balanced routing (W0), with the constants of
`h100-8`, without contention and with its own. Stock's group is the recipe's. Rows have C = E/N + 1
slots and the faster of `flat` and `node`. Experts at home have the fastest of one to three replica
slots, directly or by relay. All send tokens once per node (flex). Routing is skewed (W1) or
balanced itself; nothing here was measured.

Parallel sizes of the first recipe are Megatron-Bridge's for Qwen3-235B on H100s; the others vary
models, tensor parallelism and pipelines. T, a rank's tokens in a microbatch, is the sequence times
the micro-batch over tensor parallelism. Microbatches are twice the pipeline's stages, four without.
A stage has at least 32 ranks, among which optimizer states are sharded. GiB is the most that FSEP
needs of a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, print_table
from benchmarks.simulated import cluster_with, simulated
from megatron_laer.choices import ExchangeAlgorithm, Sharding
from megatron_laer.tools.simulator.iteration.methods import FSEP, STOCK

CLUSTER = "h100-8"
# Slowdown of GEMMs during an exchange, and of an exchange during GEMMs.
NO_CONTENTION = {"contention.gemm": 1.0, "contention.exchange": 1.0}
SKEWED, BALANCED = "W1", "W0"
MOST_REPLICA_SLOTS = 3
FEWEST_RANKS = 32


@dataclass(frozen=True)
class Recipe:
    """One recipe: its name, its number of experts and ranks, and flags of `simulate`."""

    name: str
    experts: int
    ranks: int
    flags: str

    @property
    def words(self) -> list[str]:
        world = max(self.ranks, FEWEST_RANKS)
        return ["--ranks", str(self.ranks), "--world", str(world), *self.flags.split()]


RECIPES = (
    Recipe(
        "Qwen3-235B EP32 TP2 PP8x4, T 2048",
        128,
        32,
        "--model qwen3-235b-a22b --tensor-parallel 2 --tokens 2048 --pipeline 8 "
        "--virtual-pipeline 4 --microbatches 16",
    ),
    Recipe(
        "Qwen3-235B EP8 TP4 PP8x4, T 1024",
        128,
        8,
        "--model qwen3-235b-a22b --tensor-parallel 4 --tokens 1024 --pipeline 8 "
        "--virtual-pipeline 4 --microbatches 16",
    ),
    Recipe(
        "DeepSeek-V3 EP64 TP2 PP8x4, T 2048",
        256,
        64,
        "--model deepseek-v3 --tensor-parallel 2 --tokens 2048 --pipeline 8 --virtual-pipeline 4 "
        "--microbatches 16",
    ),
    Recipe(
        "Mixtral-8x7B EP8 PP4x8, T 4096",
        8,
        8,
        "--model mixtral-8x7b-e8k2 --tokens 4096 --pipeline 4 --virtual-pipeline 8 "
        "--microbatches 8",
    ),
    Recipe(
        "Qwen3-30B EP8 PP2x24, T 8192",
        128,
        8,
        "--model qwen3-30b-a3b --tokens 8192 --pipeline 2 --virtual-pipeline 24 --microbatches 4",
    ),
    Recipe(
        "Qwen3-30B EP8, T 4096",
        128,
        8,
        "--model qwen3-30b-a3b --tokens 4096 --microbatches 4",
    ),
    Recipe(
        "Qwen3-235B EP8 PP8x4, T 8192, full recompute",
        128,
        8,
        "--model qwen3-235b-a22b --tokens 8192 --pipeline 8 --virtual-pipeline 4 "
        "--microbatches 16 --recompute full",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.home_recipes", __doc__)
    add_json(parser)
    options = parser.parse_args(arguments)
    with cluster_with(CLUSTER, NO_CONTENTION) as alone:
        clusters = {"alone": alone, "contention": CLUSTER}
        rows = [
            {"recipe": recipe.name, "simulate": " ".join(recipe.words)}
            | {name: shares(recipe, cluster) for name, cluster in clusters.items()}
            for recipe in RECIPES
        ]
    for workload in (SKEWED, BALANCED):
        print(f"share of forced balance, {workload}")
        print_table(list(_shown(rows, workload)))
    write_json(options.json, {"machine": machine(), "cluster": CLUSTER, "recipes": rows})
    return 0


def shares(recipe: Recipe, cluster: str) -> dict[str, Any]:
    """Return each sharding's share of forced balance, its slots, and its exchange, by workload."""
    group = "--stock-expert-parallel", str(recipe.ranks)
    (stock,) = _simulated(recipe, cluster, BALANCED, "--method", STOCK, *group)
    balanced_s = stock["methods"][STOCK]["iteration_s"]["value"]
    found: dict[str, Any] = {"balanced_s": balanced_s}
    for workload in (SKEWED, BALANCED):
        fastest = {each: _fastest(recipe, cluster, workload, each) for each in Sharding}
        found[workload] = {
            sharding.value: best | {"share": balanced_s / best["seconds"]}
            for sharding, best in fastest.items()
        }
    return found


def _fastest(recipe: Recipe, cluster: str, workload: str, sharding: Sharding) -> dict[str, Any]:
    """Return the fastest slots and exchange of a sharding, with their seconds."""
    least = recipe.experts // recipe.ranks + 1
    most = MOST_REPLICA_SLOTS if sharding == Sharding.EXPERTS else 1
    slots = [str(least + more) for more in range(most)]
    tried = [
        {
            "seconds": case["methods"][FSEP]["iteration_s"]["value"],
            "slots": case["capacity"],
            "exchange": algorithm.value,
            "gib": case["methods"][FSEP]["peak_bytes"] / 2**30,
        }
        for algorithm in ExchangeAlgorithm
        for case in _simulated(
            *(recipe, cluster, workload, "--method", FSEP),
            *("--sharding", sharding.value, "--restore-algorithm", algorithm.value),
            *("--capacity", *slots, "--token-exchange", "flex"),
        )
    ]
    return min(tried, key=lambda of: of["seconds"])


def _simulated(recipe: Recipe, cluster: str, workload: str, *words: str) -> list[dict[str, Any]]:
    inputs = ["--workload", workload, "--cluster", cluster, "--steps", "1"]
    recompute = [] if "--recompute" in recipe.words else ["--recompute", "compute"]
    return simulated([*inputs, *recompute, *recipe.words, *words])


def _shown(rows: Sequence[dict[str, Any]], workload: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        shown = {"recipe": row["recipe"]}
        for constants in ("alone", "contention"):
            of = row[constants][workload]
            for sharding in Sharding:
                shown[f"{sharding}, {constants}"] = f"{of[sharding.value]['share']:.3f}"
            shown[f"slots, {constants}"] = of[Sharding.EXPERTS.value]["slots"]
        shown["GiB"] = f"{max(each['gib'] for each in of.values()):.1f}"
        yield shown


if __name__ == "__main__":
    program("benchmarks.home_recipes", main)
