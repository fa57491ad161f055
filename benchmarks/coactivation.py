"""Counts rows between nodes of today's layouts, and of layouts by pairs of experts chosen together.

`python -m benchmarks.coactivation --sets FOLDER` reads files of sets: a line per token with its
experts, named `NAME.E<experts>.k<top-k>.txt.gz`. Without `--sets` tokens are routed by seed, top-8
of 128 on nodes of 8: at random, skewed, and by topic, with sources alike or of few topics each.

The first half of the tokens plans, by counts (`greedy`, the default) and by pairs. The second half
is counted, with exact quotas for its own counts, by the dispatcher's own choice of replicas for
tokens that travel once per node. Ranks have equal parts of a half, in the file's order.
*independent* draws have the second half's loads, and sets without any likeness. What today's
layouts save there with the quotas that count on visitors is *by quotas*. Nothing is sent.

Legend: N ranks, E experts, C slots per rank, T tokens, K top-k.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, print_table
from benchmarks.token_exchange import Case, Shape
from benchmarks.token_traffic import TokenRouting, dispatch_rows
from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Auto, Sharding, Split, TokenExchange
from megatron_laer.layer.dispatch.replica_choice import choose_replicas
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.token_exchange import with_token_exchange
from megatron_laer.tools.cli.argument_types import between

_NAME = re.compile(r"(?P<name>.+)\.E(?P<experts>\d+)\.k(?P<topk>\d+)\.txt\.gz")
# Log-deviations of popularity, and of a topic's experts; topics, and topics of a rank (0: all).
ROUTINGS = {
    "random": (0.0, 0.0, 1, 0),
    "skewed": (1.0, 0.0, 1, 0),
    "topics": (0.7, 1.5, 16, 0),
    "topics by rank": (0.7, 1.5, 16, 3),
}
# Experts of Qwen3-235B, and tokens of a rank, by which layouts are priced.
_HIDDEN, _FFN, _MICROBATCH_TOKENS = 4096, 1536, 8192


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.coactivation", __doc__)
    add_json(parser)
    parser.add_argument("--sets", type=Path, help="folder with files of sets")
    parser.add_argument("--nodes", type=between(1, 64), default=4)
    parser.add_argument("--node-size", type=between(1, 64), help="ranks; 2 with --sets, else 8")
    parser.add_argument("--spare", type=between(0, 512), default=4, help="C less the rounded E/N")
    parser.add_argument("--sharding", type=Sharding, choices=list(Sharding), default=Sharding.ROWS)
    parser.add_argument(
        "--tokens", type=between(64, 65536), default=4096, help="of a rank, by seed"
    )
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=0, help="of the draws")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine()}
    print(json.dumps(result["machine"]))
    result["rows"] = list(rows_of_files(options) if options.sets else rows_by_seed(options))
    result["rows"].append({"routing": "mean", **dict(means(result["rows"]))})
    print_table(result["rows"])
    if options.sets:
        print(on_independent_draws(result["rows"][-1]))
    write_json(options.json, result)
    return 0


def rows_of_files(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each file of sets."""
    files = sorted(path for path in options.sets.glob("*") if _NAME.fullmatch(path.name))
    if not files:
        raise ValueError(
            f"--sets {options.sets} has no file NAME.E<experts>.k<top-k>.txt.gz; give a folder "
            "with files of sets"
        )
    for path in files:
        expert_TK, experts = read_sets(path)
        size = node_size(experts, options.nodes, options.node_size or 2, options.sharding)
        shape = Shape(options.nodes, size, experts, expert_TK.shape[1], 0)
        geometry = geometry_of(shape, options)
        half = len(expert_TK) // 2
        first, second = (
            maps_of(part_TK, shape) for part_TK in (expert_TK[:half], expert_TK[half:])
        )
        found = planned(first, shape, geometry)
        drawn = maps_of(independent_sets(second, shape, options.seed), shape)
        yield {
            "routing": path.name.partition(".")[0],
            "C": geometry.capacity,
            **found.saved(second, shape),
            **found.saved_on_independent(drawn, shape),
            **found.times(),
        }


def rows_by_seed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each routing by seed."""
    shape = Shape(options.nodes, options.node_size or 8, 128, 8, options.tokens)
    geometry = geometry_of(shape, options)
    for routing in ROUTINGS:
        maps = topic_maps(shape, routing, options.seed)
        first, second = ([map_TE[at::2] for map_TE in maps] for at in range(2))
        found = planned(first, shape, geometry, knows_ranks=True)
        yield {
            "routing": routing,
            "C": geometry.capacity,
            **found.saved(second, shape),
            **found.times(),
        }


def geometry_of(shape: Shape, options: argparse.Namespace) -> Geometry:
    capacity = min(-(-shape.experts // shape.ranks) + options.spare, shape.experts)
    return Geometry(shape.ranks, shape.experts, capacity, shape.node_size, options.sharding)


@dataclass(frozen=True, eq=False)
class Planned:
    """Today's layout and the one by pairs, and the time to plan them."""

    today: ExpertLayout
    together: ExpertLayout
    today_s: float
    together_s: float

    def saved(self, maps: Sequence[Bool], shape: Shape) -> dict[str, float]:
        """Return rows between nodes per token and max/mean rank load, today and by pairs."""
        today, today_balance = rows_and_balance(maps, shape, self.today, 0)
        rows, balance = rows_and_balance(maps, shape, self.together, shape.topk)
        return {
            "today": today,
            "by pairs": rows,
            "saved": 1 - rows / today if today else 0.0,
            "max/mean today": today_balance,
            "max/mean": balance,
        }

    def saved_on_independent(self, maps: Sequence[Bool], shape: Shape) -> dict[str, float]:
        today, _ = rows_and_balance(maps, shape, self.today, 0)
        visiting, _ = rows_and_balance(maps, shape, self.today, shape.topk)
        rows, balance = rows_and_balance(maps, shape, self.together, shape.topk)
        return {
            "independent today": today,
            "saved by quotas": 1 - visiting / today if today else 0.0,
            "saved by both": 1 - rows / today if today else 0.0,
            "independent max/mean": balance,
        }

    def times(self) -> dict[str, float]:
        return {
            "today ms": 1e3 * self.today_s,
            "ms": 1e3 * self.together_s,
            "times": self.together_s / max(self.today_s, 1e-4),
        }


def planned(
    maps: Sequence[Bool], shape: Shape, geometry: Geometry, *, knows_ranks: bool = False
) -> Planned:
    """Plan from these tokens, by counts and by pairs, whose ranks are alike or known."""
    counts_NE = counts_of(maps)
    chosen_TE = np.concatenate(maps).astype(np.int64)
    pairs_EE = chosen_TE.T @ chosen_TE
    strategy = GreedyStrategy(geometry, priced(geometry, shape))
    strategy.plan(counts_NE, geometry.static_layout)  # the prices are made once per run
    start_s = time.process_time()
    today = strategy.plan(counts_NE, geometry.static_layout)
    today_s = time.process_time() - start_s
    start_s = time.process_time()
    together = place_together(pairs_EE, geometry, counts_NE if knows_ranks else None).layout
    return Planned(today, together, today_s, time.process_time() - start_s)


def priced(geometry: Geometry, shape: Shape) -> CostModel:
    """Return training's prices for a microbatch of usual size."""
    cluster = load_cluster("a100-4x8-ib800")
    costs = CostModel(cluster, _HIDDEN, _FFN, gated=True, bytes_per_element=2)
    of_tokens = with_token_exchange(
        costs, TokenExchange.NODE, geometry, shape.topk, _MICROBATCH_TOKENS
    )
    return of_tokens.with_exchange(Auto.AUTO, geometry)


def on_independent_draws(mean: dict[str, Any]) -> str:
    """Return the line that says how much of the saving there is the layouts'."""
    quotas, both = mean["saved by quotas"], mean["saved by both"]
    return (
        f"independent draws: {both:.1%} fewer rows, {quotas:.1%} with today's layouts and the same "
        f"quotas; the layouts by pairs change {both - quotas:+.1%}"
    )


def node_size(num_experts: int, nodes: int, least: int, sharding: Sharding) -> int:
    """Return a node's ranks: with experts at home the first number from `least` that divides."""
    if sharding == Sharding.ROWS:
        return least
    fits = [size for size in range(least, num_experts) if num_experts % (nodes * size) == 0]
    if not fits:
        raise ValueError(
            f"{num_experts} experts cannot be at home on {nodes} nodes of {least} or more ranks; "
            "give a smaller --node-size, or --sharding rows"
        )
    return fits[0]


def rows_and_balance(
    maps: Sequence[Bool], shape: Shape, layout: ExpertLayout, top_k: int
) -> tuple[float, float]:
    """Count rows to other nodes per token, as the dispatcher chooses, and max/mean rank load."""
    case = Case.of(maps, shape, layout, Split.EXACT, top_k)
    slots = [
        choose_replicas(torch.from_numpy(map_TE), quotas, shape.node_size, rank).numpy()
        for rank, (map_TE, quotas) in enumerate(zip(maps, case.quotas, strict=True))
    ]
    routing = TokenRouting.count(maps, slots, layout.capacity, shape.node_size)
    sent = dispatch_rows(routing, TokenExchange.NODE)
    return float(sent.inter_N.sum()) / sum(map(len, maps)), case.max_over_mean


def read_sets(path: Path) -> tuple[Int64, int]:
    """Read each token's experts, int64 [T, K], and the number of experts from the file's name."""
    named = _NAME.fullmatch(path.name)
    assert named is not None
    with gzip.open(path, "rt") as lines:
        expert_TK = np.array([[int(word) for word in line.split()] for line in lines])
    return expert_TK, int(named["experts"])


def maps_of(expert_TK: Int64, shape: Shape) -> list[Bool]:
    """Return each rank's router map, of equal parts of the tokens."""
    map_TE = np.zeros((len(expert_TK), shape.experts), dtype=np.bool_)
    np.put_along_axis(map_TE, expert_TK, True, axis=1)
    bounds = [rank * len(map_TE) // shape.ranks for rank in range(shape.ranks + 1)]
    return [map_TE[begin:end] for begin, end in pairwise(bounds)]


def topic_maps(shape: Shape, routing: str, seed: int) -> list[Bool]:
    """Draw each token's K experts by popularity and its topic, one of all or of its rank's."""
    popularity, affinity, topics, of_rank = ROUTINGS[routing]
    rng = np.random.default_rng(seed)
    log_E = popularity * rng.normal(size=shape.experts)
    log_XE: npt.NDArray[np.float64] = affinity * rng.normal(size=(topics, shape.experts)) + log_E
    maps = []
    for _ in range(shape.ranks):
        own = rng.permutation(topics)[: of_rank or topics]
        noisy_TE = log_XE[rng.choice(own, size=shape.tokens)]
        noisy_TE += rng.gumbel(size=noisy_TE.shape)
        map_TE = np.zeros(noisy_TE.shape, dtype=np.bool_)
        chosen_TK = np.argpartition(-noisy_TE, shape.topk - 1, axis=1)[:, : shape.topk]
        np.put_along_axis(map_TE, chosen_TK, True, axis=1)
        maps.append(map_TE)
    return maps


def counts_of(maps: Sequence[Bool]) -> Int64:
    return np.stack([map_TE.sum(axis=0, dtype=np.int64) for map_TE in maps])


def independent_sets(maps: Sequence[Bool], shape: Shape, seed: int) -> Int64:
    """Draw sets with these loads, expert by expert: each token misses as many as it should.

    Systematic sampling in a random order of experts for each token keeps each expert's chance at
    its share of tokens, where popularity alone would flatten the loads of the most chosen.
    """
    rng = np.random.default_rng(seed)
    share_E = counts_of(maps).sum(axis=0) / sum(map(len, maps))
    sets = []
    for _ in range(sum(map(len, maps))):
        order_E = rng.permutation(shape.experts)
        ends_E = np.cumsum(share_E[order_E])
        at_K = rng.random() + np.arange(shape.topk)
        sets.append(order_E[np.minimum(np.searchsorted(ends_E, at_K, "right"), shape.experts - 1)])
    return np.array(sets)


def means(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    for name in rows[0]:
        if name != "routing":
            yield name, float(np.mean([row[name] for row in rows]))


if __name__ == "__main__":
    program("python -m benchmarks.coactivation", main)
