"""Counts the rows of token exchanges, and what a choice of replicas saves, by formula.

`python -m benchmarks.token_exchange` routes tokens by seed and makes a layout for their counts.
Quotas are exact or even, and rows are counted as `token_traffic.py` describes. Nothing is sent, and
only the choice's time is measured.

Legend: N ranks, E experts, C slots per rank, S slots, T tokens of a rank, K top-k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.command_line import add_json, parser_of, program, write_json
from benchmarks.report import machine, median_ms, print_table
from benchmarks.token_traffic import TokenRouting, TokenTraffic, dispatch_rows
from megatron_laer.arrays import Bool
from megatron_laer.choices import Split, TokenExchange
from megatron_laer.layer.dispatch import replica_choice
from megatron_laer.layer.dispatch.replica_choice import choose_replicas, token_order
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from megatron_laer.tools.cli.argument_types import between

SKEWS = {"random": 0.0, "skewed": 1.0}


@dataclass(frozen=True)
class Shape:
    nodes: int
    node_size: int
    experts: int
    topk: int
    tokens: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.node_size


TOP_8_OF_128 = Shape(nodes=4, node_size=8, experts=128, topk=8, tokens=4096)
# With 8 ranks in a node, every node would have all 8 experts.
TOP_2_OF_8 = Shape(nodes=4, node_size=2, experts=8, topk=2, tokens=4096)
CAPACITIES = {TOP_8_OF_128: (4, 5, 8), TOP_2_OF_8: (1, 2, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.token_exchange", __doc__)
    add_json(parser)
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=0)
    parser.add_argument("--quick", action="store_true", help="few tokens, and no times")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": {**machine(), "torch": torch.__version__}}
    print(json.dumps(result["machine"]))
    tokens = 256 if options.quick else None
    result["rows"] = [
        row
        for shape in CAPACITIES
        for row in rows_of(_with_tokens(shape, tokens or shape.tokens), options.seed)
    ]
    print_table(result["rows"])
    if not options.quick:
        torch.set_num_threads(1)
        result["times"] = list(times(options.seed))
        print_table(result["times"])
    write_json(options.json, result)
    return 0


def rows_of(shape: Shape, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows per token between nodes and between ranks, by routing, capacity and split."""
    capacities = next(
        found for known, found in CAPACITIES.items() if _with_tokens(known, shape.tokens) == shape
    )
    for routing in SKEWS:
        maps = routing_maps(shape, SKEWS[routing], seed)
        for capacity in capacities:
            for split in (Split.EXACT, Split.EVEN):
                yield {
                    "shape": f"top-{shape.topk} of {shape.experts}",
                    "routing": routing,
                    "C": capacity,
                    "split": split.value,
                    **Case.make(maps, shape, capacity, split).figures(),
                }


@dataclass(frozen=True, eq=False)
class Case:
    """One microbatch of a layer, on all ranks."""

    maps: Sequence[Bool]
    shape: Shape
    layout: ExpertLayout
    max_over_mean: float
    quotas: Sequence[RankQuotas]

    @classmethod
    def make(cls, maps: Sequence[Bool], shape: Shape, capacity: int, split: Split) -> Case:
        """Plan and split these tokens."""
        counts_NE = np.stack([map_TE.sum(axis=0, dtype=np.int64) for map_TE in maps])
        static = ExpertLayout.static(shape.ranks, capacity, shape.experts)
        return cls.of(maps, shape, construct_layout(counts_NE, static, shape.node_size), split)

    @classmethod
    def of(
        cls,
        maps: Sequence[Bool],
        shape: Shape,
        layout: ExpertLayout,
        split: Split,
        top_k: int = 0,
    ) -> Case:
        """Split tokens over a layout; see `Geometry.top_k`."""
        counts_NE = np.stack([map_TE.sum(axis=0, dtype=np.int64) for map_TE in maps])
        quotas = solve_quotas(split, counts_NE, layout, shape.node_size, top_k)
        mine = [
            RankQuotas.of(layout, quotas.rank_row(rank), quotas.rank_columns(rank))
            for rank in range(shape.ranks)
        ]
        return cls(maps, shape, layout, max_over_mean(fsep_tokens_N(quotas)), mine)

    def figures(self) -> dict[str, Any]:
        """Return rows per token of both exchanges and both choices, and the expectations' error."""
        plain, chosen = (self.count(chooses=chooses) for chooses in (False, True))
        rows_NS = np.stack([quotas.row_S for quotas in self.quotas])
        tokens_N = np.array([len(map_TE) for map_TE in self.maps])
        expected = TokenRouting.expect(rows_NS, tokens_N, self.layout, self.shape.node_size)
        total = int(tokens_N.sum())

        def per_token(routing: TokenRouting, exchange: TokenExchange) -> tuple[float, float]:
            rows: TokenTraffic = dispatch_rows(routing, exchange)
            return float(rows.inter_N.sum()) / total, float(rows.intra_N.sum()) / total

        rank_inter, rank_intra = per_token(plain, TokenExchange.RANK)
        node_inter, node_intra = per_token(plain, TokenExchange.NODE)
        chosen_inter, chosen_intra = per_token(chosen, TokenExchange.NODE)
        expected_inter, _ = per_token(expected, TokenExchange.NODE)
        return {
            "max/mean": self.max_over_mean,
            "with choice": self._share_with_choice(rows_NS),
            "rank inter": rank_inter,
            "node inter": node_inter,
            "node/rank": node_inter / rank_inter if rank_inter else 1.0,
            "chosen inter": chosen_inter,
            "saved": 1 - chosen_inter / node_inter if node_inter else 0.0,
            "expected": expected_inter / node_inter if node_inter else 1.0,
            "rank intra": rank_intra,
            "node intra": node_intra,
            "chosen intra": chosen_intra,
        }

    def count(self, *, chooses: bool) -> TokenRouting:
        """Count rows with the choice of replicas, or in token order."""
        slots = [self.slots(rank, chooses=chooses).numpy() for rank in range(self.shape.ranks)]
        return TokenRouting.count(self.maps, slots, self.layout.capacity, self.shape.node_size)

    def slots(self, rank: int, *, chooses: bool) -> torch.Tensor:
        map_TE, quotas = torch.from_numpy(self.maps[rank]), self.quotas[rank]
        if chooses:
            with mock.patch.object(replica_choice, "_LEAST_SHARE", 0.0):  # also for a small gain
                return choose_replicas(map_TE, quotas, self.shape.node_size, rank)
        return token_order(map_TE, quotas, self.shape.node_size)

    def _share_with_choice(self, rows_NS: npt.NDArray[np.int64]) -> float:
        """Return the share of pairs whose expert has tokens of their rank in several nodes."""
        slots_per_node = self.shape.node_size * self.layout.capacity
        node_S = np.arange(self.layout.num_slots) // slots_per_node
        tokens_NEM = np.zeros((len(rows_NS), self.shape.experts, self.shape.nodes), dtype=np.int64)
        np.add.at(tokens_NEM.transpose(1, 2, 0), (self.layout.slot_expert_S, node_S), rows_NS.T)
        has_choice_NE = (tokens_NEM > 0).sum(axis=2) > 1
        return float((tokens_NEM.sum(axis=2) * has_choice_NE).sum() / rows_NS.sum())


def times(seed: int) -> Iterator[dict[str, Any]]:
    """Yield milliseconds of a rank's choice on one thread, next to token order."""
    for tokens in (4096, 8192):
        shape = _with_tokens(TOP_8_OF_128, tokens)
        maps = routing_maps(shape, SKEWS["skewed"], seed)
        for capacity in (5, 8):
            for split in Split:
                case = Case.make(maps, shape, capacity, split)
                yield {
                    "tokens": tokens,
                    "C": capacity,
                    "split": split.value,
                    "token order ms": median_ms(lambda c=case: c.slots(0, chooses=False), 11),
                    "choice ms": median_ms(lambda c=case: c.slots(0, chooses=True), 11),
                }


def routing_maps(shape: Shape, skew: float, seed: int) -> list[Bool]:
    """Draw each token's K experts without replacement, by popularity with this log-deviation."""
    rng = np.random.default_rng(seed)
    log_E = skew * rng.normal(size=shape.experts)
    maps = []
    for _ in range(shape.ranks):
        noisy_TE = log_E + rng.gumbel(size=(shape.tokens, shape.experts))
        map_TE = np.zeros(noisy_TE.shape, dtype=np.bool_)
        chosen_TK = np.argpartition(-noisy_TE, shape.topk - 1, axis=1)[:, : shape.topk]
        np.put_along_axis(map_TE, chosen_TK, True, axis=1)
        maps.append(map_TE)
    return maps


def _with_tokens(shape: Shape, tokens: int) -> Shape:
    return Shape(shape.nodes, shape.node_size, shape.experts, shape.topk, tokens)


if __name__ == "__main__":
    program("python -m benchmarks.token_exchange", main)
