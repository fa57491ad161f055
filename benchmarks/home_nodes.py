"""Predicted time of a layer between nodes: rows, and home experts with one to three replica slots.

Part of `python -m benchmarks.home`. Loads are log-normal, the same shares on all ranks. Layouts are
`greedy`'s for these very counts.

Legend: N ranks, E experts, K top-k, T tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Auto, Dispatch, Sharding
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.token_exchange import with_token_exchange

_NODE_SIZE, _BYTES = 8, 2


class Case(NamedTuple):
    """One model on one cluster."""

    model: str
    cluster: str
    hidden: int
    ffn: int
    experts: int
    topk: int
    ranks: int
    tokens: int
    sigma: float


_QWEN, _DEEPSEEK = ("Qwen3-235B", 4096, 1536, 128, 8), ("DeepSeek-V3", 7168, 2048, 256, 8)


def _case(model: tuple[Any, ...], cluster: str, ranks: int, sigma: float) -> Case:
    return Case(model[0], cluster, *model[1:], ranks, 2048, sigma)


CASES = (
    *(_case(_QWEN, "h100-8", 32, sigma) for sigma in (0.3, 0.6, 1.0)),
    _case(_DEEPSEEK, "h100-8", 64, 0.6),
    _case(_QWEN, "a100-4x8-ib800", 32, 0.6),
)


def across_nodes(draws: int) -> Iterator[dict[str, Any]]:
    """Yield means over draws of each case and sharding.

    `layer_ms` has tokens and experts, `with_exchanges_ms` also the exchanges of weights and
    gradients. `off_node` is the share of tokens that leave their node, and `weight_MB` the busiest
    rank's bytes of one restore.
    """
    for case in CASES:
        share = case.experts // case.ranks
        for sharding, spare in ((Sharding.ROWS, 1), *((Sharding.EXPERTS, n) for n in (1, 2, 3))):
            shape = case.ranks, case.experts, share + spare, _NODE_SIZE
            geometry = Geometry(*shape, sharding)
            rng = np.random.default_rng(0)
            found = [_priced(case, geometry, _counts_NE(case, rng)) for _ in range(draws)]
            name = f"{case.model}, {case.ranks} of {case.cluster}, sigma {case.sigma}"
            means = {key: float(np.mean([of[key] for of in found])) for key in found[0]}
            yield {"case": name, "sharding": sharding.value, "replica slots": spare, **means}


def _counts_NE(case: Case, rng: np.random.Generator) -> Int64:
    share_E = rng.lognormal(0, case.sigma, case.experts)
    pairs = case.tokens * case.topk
    return rng.multinomial(pairs, share_E / share_E.sum(), size=case.ranks).astype(np.int64)


def _priced(case: Case, geometry: Geometry, counts_NE: Int64) -> dict[str, float]:
    costs = CostModel(load_cluster(case.cluster), case.hidden, case.ffn, True, _BYTES)
    costs = with_token_exchange(costs, Dispatch.RANK, geometry, case.topk, case.tokens)
    costs = costs.with_exchange(Auto.AUTO, geometry)
    layout = GreedyStrategy(geometry, costs).plan(counts_NE, geometry.static_layout)
    placed = Placed(layout, geometry)
    totals = exact_split(layout, geometry.node_size).totals(counts_NE)
    layer_s = costs.split_seconds(totals, geometry)
    exchanges_s = costs.exchanges_seconds(placed, layer_s)
    traffic = costs.restore_bytes(placed, costs.way_of(placed))
    filled = int(layout.replicas_E.sum()) - geometry.num_experts
    return {
        "layer_ms": layer_s * 1e3,
        "with_exchanges_ms": (layer_s + exchanges_s) * 1e3,
        "off_node": float(totals.far_S.sum() / counts_NE.sum()),
        "weight_MB": float((traffic.intra_N + traffic.inter_N).max()) / 1e6,
        "replicas_per_rank": filled / geometry.num_ranks,
    }
