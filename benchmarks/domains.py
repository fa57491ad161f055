"""Counts rows between nodes of layouts that are planned for single nodes, and for pairs of nodes.

`python -m benchmarks.domains` routes tokens by seed: at random, skewed, and by topic, with sources
alike or of few topics each. Layouts are *fresh* ones for the counts, and *planned* ones of the
default strategy. Exact quotas are made for as many nodes, and rows counted as `token_traffic.py`
describes, for tokens that travel once per node. *auto* is the domain that training takes by price,
once, before it knows any routing. Nothing is sent.

Legend: N ranks, E experts, C slots per rank, T tokens of a rank, K top-k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, print_table
from benchmarks.token_exchange import TOP_8_OF_128, Case, Shape
from benchmarks.token_traffic import dispatch_rows
from megatron_laer.arrays import Bool
from megatron_laer.choices import Auto, Sharding, Split, TokenExchange
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.sharding_choice import choose_geometry
from megatron_laer.planner.token_exchange import with_token_exchange
from megatron_laer.tools.cli.argument_types import between

# Log-deviations of popularity, and of a topic's experts; topics, and topics of a rank (0: all).
ROUTINGS = {
    "random": (0.0, 0.0, 1, 0),
    "skewed": (1.0, 0.0, 1, 0),
    "topics": (0.7, 1.5, 16, 0),
    "topics by rank": (0.7, 1.5, 16, 3),
}
CAPACITIES, DOMAINS, CLUSTER = (5, 8, 12, 17), (1, 2), "a100-4x8-ib800"
# Experts of Qwen3-235B, and tokens of a rank by which `auto` decides.
_HIDDEN, _FFN, _MICROBATCH_TOKENS = 4096, 1536, 8192
# Rows per token below which there is nothing to save.
_FEW_ROWS = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.domains", __doc__)
    add_json(parser)
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=0)
    parser.add_argument("--tokens", type=between(64, 65536), default=4096, help="of a rank")
    parser.add_argument("--cluster", default=CLUSTER)
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine()}
    print(json.dumps(result["machine"]))
    shape = Shape(TOP_8_OF_128.nodes, TOP_8_OF_128.node_size, 128, 8, options.tokens)
    result["rows"] = list(rows_of(shape, options.seed, options.cluster))
    print_table(result["rows"])
    write_json(options.json, result)
    return 0


def rows_of(shape: Shape, seed: int, cluster: str) -> Iterator[dict[str, Any]]:
    """Yield rows between nodes per token, by routing, capacity and domain."""
    taken = {capacity: chosen_domain(shape, capacity, cluster) for capacity in CAPACITIES}
    for routing in ROUTINGS:
        maps = topic_maps(shape, routing, seed)
        for capacity in CAPACITIES:
            row = row_of(shape, maps, capacity)
            yield {"routing": routing, "C": capacity, **row, "auto": taken[capacity]}


def row_of(shape: Shape, maps: Sequence[Bool], capacity: int) -> dict[str, Any]:
    """Return rows between nodes per token by kind of layout and domain, and the worst balance."""
    counts_NE = np.stack([map_TE.sum(axis=0, dtype=np.int64) for map_TE in maps])
    found: dict[str, Any] = {}
    ratios = []
    for kind in ("fresh", "planned"):
        for nodes in DOMAINS:
            geometry = Geometry(
                shape.ranks, shape.experts, capacity, shape.node_size, domain_nodes=nodes
            )
            layout = geometry.static_layout
            if kind == "fresh":
                layout = construct_layout(counts_NE, layout, geometry.domain_size)
            else:
                layout = GreedyStrategy(geometry, priced(geometry, shape)).plan(counts_NE, layout)
            case = Case.of(maps, shape, layout, geometry.domain_size, Split.EXACT)
            sent = dispatch_rows(case.count(chooses=False), TokenExchange.NODE)
            rows = float(sent.inter_N.sum()) / sum(map(len, maps))
            found[f"{kind}: {nodes} node{'s'[: nodes - 1]}"] = rows
            ratios.append(case.max_over_mean)
        first, last = (found[f"{kind}: {nodes}"] for nodes in ("1 node", "2 nodes"))
        found[f"{kind}: saved"] = 1 - last / first if first > _FEW_ROWS else 0.0
    return {**found, "max/mean": max(ratios)}


def priced(geometry: Geometry, shape: Shape, cluster: str = CLUSTER) -> CostModel:
    """Return training's prices for a microbatch of usual size."""
    costs = CostModel(load_cluster(cluster), _HIDDEN, _FFN, gated=True, bytes_per_element=2)
    of_tokens = with_token_exchange(
        costs, TokenExchange.NODE, geometry, shape.topk, _MICROBATCH_TOKENS
    )
    return of_tokens.with_exchange(Auto.AUTO, geometry)


def chosen_domain(shape: Shape, capacity: int, cluster: str) -> int:
    """Return the nodes for which training plans together by itself."""
    config = FSEPConfig(
        sharding=Sharding.ROWS, capacity=capacity, token_exchange=TokenExchange.NODE
    )
    sizes = shape.ranks, shape.experts, shape.node_size
    chosen, _ = choose_geometry(
        config, sizes, 1, shape.topk, lambda geometry: priced(geometry, shape, cluster)
    )
    return chosen.geometry.domain_nodes


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


if __name__ == "__main__":
    program("python -m benchmarks.domains", main)
