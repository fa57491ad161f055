"""Counts rows between nodes of today's layouts, and of layouts by pairs of experts chosen together.

`python -m benchmarks.coactivation --sets FOLDER` reads files of sets: a line per token with its
experts, named `NAME.E<experts>.k<top-k>.txt.gz`. The first half of the tokens plans, by counts
(`greedy`, the default) and by pairs. The second half is counted, with exact quotas for its own
counts, by the dispatcher's own choice of replicas for tokens that travel once per node. Ranks have
equal parts of a half, in the file's order. *independent* draws have the second half's loads, and
sets without any likeness. Nothing is sent.

Legend: N ranks, E experts, C slots per rank, T tokens, K top-k.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.domains import priced
from benchmarks.report import machine, print_table
from benchmarks.token_exchange import Case, Shape
from benchmarks.token_traffic import TokenRouting, dispatch_rows
from megatron_laer.arrays import Bool, Int64
from megatron_laer.choices import Sharding, Split, TokenExchange
from megatron_laer.layer.dispatch.replica_choice import choose_replicas
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.tools.cli.argument_types import between

_NAME = re.compile(r"(?P<name>.+)\.E(?P<experts>\d+)\.k(?P<topk>\d+)\.txt\.gz")
_NODES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.coactivation", __doc__)
    add_json(parser)
    parser.add_argument("--sets", type=Path, required=True, help="folder with files of sets")
    parser.add_argument("--node-size", type=between(1, 64), default=2, help="ranks of a node")
    parser.add_argument("--spare", type=between(0, 512), default=4, help="C less the rounded E/N")
    parser.add_argument("--sharding", type=Sharding, choices=list(Sharding), default=Sharding.ROWS)
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=0, help="of the draws")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine()}
    print(json.dumps(result["machine"]))
    files = sorted(path for path in options.sets.glob("*") if _NAME.fullmatch(path.name))
    if not files:
        raise ValueError(
            f"--sets {options.sets} has no file NAME.E<experts>.k<top-k>.txt.gz; give a folder "
            "with files of sets"
        )
    result["rows"] = []
    for path in files:
        expert_TK, num_experts = read_sets(path)
        size = node_size(num_experts, options.node_size, options.sharding)
        shape = Shape(_NODES, size, num_experts, expert_TK.shape[1], 0)
        capacity = -(-num_experts // shape.ranks) + options.spare
        geometry = Geometry(shape.ranks, num_experts, capacity, size, options.sharding)
        name = path.name.partition(".")[0]
        result["rows"].append(
            {
                "file": name,
                "N": shape.ranks,
                "C": capacity,
                **row_of(expert_TK, shape, geometry, options.seed),
            }
        )
    result["rows"].append({"file": "mean", **dict(means(result["rows"]))})
    print_table(result["rows"])
    write_json(options.json, result)
    return 0


def row_of(expert_TK: Int64, shape: Shape, geometry: Geometry, seed: int) -> dict[str, Any]:
    """Return rows between nodes per token and balance, with today's layout and by pairs."""
    half = len(expert_TK) // 2
    first, second = (maps_of(part_TK, shape) for part_TK in (expert_TK[:half], expert_TK[half:]))
    drawn = maps_of(independent_sets(second, shape, seed), shape)
    chosen_TE = np.concatenate(first).astype(np.int64)
    pairs_EE = chosen_TE.T @ chosen_TE

    start_s = time.process_time()
    strategy = GreedyStrategy(geometry, priced(geometry, shape))
    today = strategy.plan(counts_of(first), geometry.static_layout)
    today_s = time.process_time() - start_s
    ours = place_together(pairs_EE, geometry).layout
    ours_s = time.process_time() - start_s - today_s

    found: dict[str, Any] = {}
    for kind, maps in (("", second), ("independent ", drawn)):
        before, found[f"{kind}max/mean today"] = rows_and_balance(maps, shape, today, 0)
        after, found[f"{kind}max/mean"] = rows_and_balance(maps, shape, ours, shape.topk)
        found |= {f"{kind}today": before, f"{kind}by pairs": after}
        found[f"{kind}saved"] = 1 - after / before if before else 0.0
    return {**found, "times today's planning": ours_s / max(today_s, 1e-4)}


def node_size(num_experts: int, least: int, sharding: Sharding) -> int:
    """Return a node's ranks: with experts at home the first number from `least` that divides."""
    if sharding == Sharding.ROWS:
        return least
    fits = [size for size in range(least, num_experts) if num_experts % (_NODES * size) == 0]
    if not fits:
        raise ValueError(
            f"{num_experts} experts cannot be at home on {_NODES} nodes of {least} or more ranks; "
            "give a smaller --node-size, or --sharding rows"
        )
    return fits[0]


def rows_and_balance(
    maps: Sequence[Bool], shape: Shape, layout: ExpertLayout, top_k: int
) -> tuple[float, float]:
    """Count rows to other nodes per token, as the dispatcher chooses, and max/mean rank load."""
    case = Case.of(maps, shape, layout, shape.node_size, Split.EXACT, top_k)
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
        if name != "file":
            yield name, float(np.mean([row[name] for row in rows]))


if __name__ == "__main__":
    program("python -m benchmarks.coactivation", main)
