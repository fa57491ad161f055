"""Layouts by pairs of experts next to those of a strategy, and the faster of both by one price.

Counts do not say which experts one token chose, so a strategy assumes independent choices. Pairs
say how many rows a layout really sends between nodes (`coactivation`). A layout by pairs takes long
to make: it is kept until the next pairs, and priced anew at every step.

Pure values and functions; the planner's thread (`service`) decides when layouts are made.

Legend: N ranks, E experts, L layers, C slots per rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.choices import Split
from megatron_laer.planner.coactivation import place_together
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.crossings import NOWHERE, Crossings, hosts_of
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.quotas import SplitTotals, even_split

# Unit of a share of rows: integers are broadcast, saved and recorded without rounding.
WHOLE = 1_000_000
# Most that a share may differ from 1, either way: the guard's prices are scaled by it.
_MOST = 10.0
# A layout sends more rows than the pairs that it was made from lead us to expect: on real sets
# (`benchmarks.coactivation`) 1.03 times as many, as rows, compared with layouts by counts; at home
# 1.02 times. The largest are 1.18 and 1.12.
_FITTED = 1.05
# Replicas of home experts: any fixed number, and changes that are tried for each slot.
_SEED, _TRIES = 2602, 24
# Least part of the rows that a change saves, since a price takes longer than the rows.
_LEAST_GAIN = 0.0005


@dataclass(frozen=True, eq=False)
class PlacedPairs:
    """Pairs in use, int64 [L, E, E], and each layer's layout by pairs, None before its first.

    `waiting` layers have no layout by these pairs yet, in the order in which they get one.
    """

    pairs_LEE: Int64
    layouts: tuple[ExpertLayout | None, ...]
    waiting: tuple[int, ...]

    def __post_init__(self) -> None:
        layers = range(len(self.pairs_LEE))
        if len(self.layouts) != len(layers) or not set(self.waiting) <= set(layers):
            raise ValueError(
                f"pairs of {len(layers)} layers with {len(self.layouts)} layouts, of which layers "
                f"{self.waiting} wait: there must be a layout of each"
            )

    @classmethod
    def first(cls, pairs_LEE: Int64) -> PlacedPairs:
        num_layers = len(pairs_LEE)
        return cls(pairs_LEE, (None,) * num_layers, tuple(range(num_layers)))

    def renewed(self, pairs_LEE: Int64) -> PlacedPairs:
        """Return newer pairs, for which every layer waits: those first that waited already."""
        others = (layer for layer in range(len(pairs_LEE)) if layer not in self.waiting)
        return PlacedPairs(pairs_LEE, self.layouts, (*self.waiting, *others))

    def placed(self, layer: int, layout: ExpertLayout | None) -> PlacedPairs:
        """Return the same pairs with this layout of a layer that waited."""
        layouts = [layout if at == layer else other for at, other in enumerate(self.layouts)]
        left = tuple(other for other in self.waiting if other != layer)
        return replace(self, layouts=tuple(layouts), waiting=left)


@dataclass(frozen=True)
class Choice:
    """Layout with fewer predicted seconds, and its rows between nodes in millionths.

    They are rows per pair of a token and an expert, of those that the layout by counts sends.
    """

    layout: ExpertLayout
    row_share: int = WHOLE


@dataclass(frozen=True)
class PairPlanner:
    """Maker and judge of layouts by pairs for one geometry; `costs` price tokens once per node.

    `interval` is the number of steps between pairs.
    """

    geometry: Geometry
    costs: CostModel
    interval: int
    split: Split = Split.EXACT
    overlaps: bool = True

    def layers_per_step(self, num_layers: int) -> int:
        """Return the layers to place after each step, so that all are before the next pairs."""
        return -(-num_layers // self.interval)

    def place(
        self, pairs_EE: Int64, counts_NE: Int64, by_counts: ExpertLayout
    ) -> ExpertLayout | None:
        """Return a layout by pairs; None without any tokens.

        As rows, every slot is free. With home experts, the replicas of `by_counts` are changed
        while the predicted time of these counts falls.
        """
        if not pairs_EE.any():
            return None
        if not self.geometry.home_slots:
            return place_together(pairs_EE, self.geometry, counts_NE).layout
        return _Replicas(self, self.crossings(pairs_EE, counts_NE), counts_NE).improved(by_counts)

    def choose(
        self,
        counts_NE: Int64,
        by_counts: ExpertLayout,
        by_pairs: ExpertLayout | None,
        pairs_EE: Int64,
    ) -> Choice:
        """Return the faster of both layouts; of equals the one by counts."""
        if by_pairs is None or by_pairs == by_counts or not pairs_EE.any():
            return Choice(by_counts)
        crossings = self.crossings(pairs_EE, counts_NE)
        counts_rows, pairs_rows = (
            crossings.rows(hosts_of(layout, self.geometry)) for layout in (by_counts, by_pairs)
        )
        counts_s, counts_share = self.price(counts_NE, by_counts, counts_rows)
        pairs_s, pairs_share = self.price(counts_NE, by_pairs, pairs_rows * _FITTED)
        if pairs_s >= counts_s:
            return Choice(by_counts)
        share = pairs_share / counts_share if counts_share else 1.0
        return Choice(by_pairs, round(min(max(share, 1 / _MOST), _MOST) * WHOLE))

    def crossings(self, pairs_EE: Int64, counts_NE: Int64) -> Crossings:
        """Return the rows that pairs lead us to expect for tokens of ranks with these counts."""
        nodes, size = self.geometry.num_nodes, self.geometry.node_size
        counts_ME = counts_NE.reshape(nodes, size, -1).sum(axis=1)
        return Crossings(pairs_EE, nodes, counts_ME)

    def price(
        self, counts_NE: Int64, layout: ExpertLayout, rows_per_token: float
    ) -> tuple[float, float]:
        """Predict the seconds of a layer and microbatch, with its exchanges of weights.

        Counts may have any unit. Also return the rows between nodes as a share of those that the
        prices of tokens assume, 0 if they assume none. Where exact quotas send tokens off a node
        that has their experts, a row has at most top-k pairs.
        """
        geometry, prices = self.geometry, self.costs.tokens
        counts_NE = _as_microbatch(counts_NE, self.costs.pairs_per_rank)
        totals = self._totals(counts_NE, layout)
        pairs_per_row = geometry.top_k
        rows = max(rows_per_token * int(counts_NE.sum()), int(totals.far_S.sum())) / pairs_per_row
        assumed = prices.sent_between_nodes(totals)
        share = rows / assumed if assumed else 0.0
        costs = replace(self.costs, tokens=prices.with_rows(share))
        layer_s = costs.split_seconds(totals, layout, geometry.node_size)
        hiding_s = layer_s if self.overlaps else 0.0
        exchanges_s = costs.exchanges_seconds(
            layout, geometry.node_size, hiding_s, geometry.home_slots
        )
        return layer_s + exchanges_s, share

    def _totals(self, counts_NE: Int64, layout: ExpertLayout) -> SplitTotals:
        size = self.geometry.node_size
        if self.split == Split.EVEN:
            return even_split(layout, size).totals(counts_NE)
        return exact_split(layout, size, self.geometry.top_k).totals(counts_NE)


@dataclass(frozen=True, eq=False)
class _Replicas:
    """Search for the replicas of home experts that make these counts fastest."""

    planner: PairPlanner
    crossings: Crossings
    counts_NE: Int64

    def improved(self, start: ExpertLayout) -> ExpertLayout:
        """Change replicas at random, more chosen experts more often, while seconds fall."""
        geometry = self.planner.geometry
        rng = np.random.default_rng(_SEED)
        load_E = np.maximum(self.crossings.pairs_EE.diagonal(), 1)
        tries = _TRIES * geometry.num_ranks * geometry.replica_slots
        rank_X = rng.integers(geometry.num_ranks, size=tries)
        slot_X = rng.integers(geometry.home_slots, geometry.capacity, size=tries)
        expert_X = rng.choice(geometry.num_experts, size=tries, p=load_E / load_E.sum())
        ranks = start.slot_expert_S.reshape(geometry.num_ranks, -1).tolist()
        nodes = [
            Counter(chain.from_iterable(ranks[first : first + geometry.node_size]))
            for first in range(0, geometry.num_ranks, geometry.node_size)
        ]
        expected = self.crossings.of(hosts_of(start, geometry))
        found, rows = start, expected.rows()
        seconds = self._seconds(start, rows)
        # Python's numbers: this thread holds the lock that training's launches need.
        for rank, slot, expert in zip(
            rank_X.tolist(), slot_X.tolist(), expert_X.tolist(), strict=True
        ):
            at, old = rank // geometry.node_size, ranks[rank][slot]
            if nodes[at][expert]:  # no row less
                continue
            leaves = old != EMPTY and nodes[at][old] == 1
            expected.move(expert, NOWHERE, at)
            if leaves:
                expected.move(old, at, NOWHERE)
            if (after := expected.rows()) < (1 - _LEAST_GAIN) * rows:
                changed = self._with(found, rank, slot, expert)
                if (after_s := self._seconds(changed, after)) < seconds:
                    found, rows, seconds = changed, after, after_s
                    nodes[at].update({expert: 1, old: -1})
                    ranks[rank] = changed.slot_expert_S.reshape(len(ranks), -1)[rank].tolist()
                    continue
            if leaves:
                expected.move(old, NOWHERE, at)
            expected.move(expert, at, NOWHERE)
        return found

    def _with(self, layout: ExpertLayout, rank: int, slot: int, expert: int) -> ExpertLayout:
        """Return the layout with another replica in a slot."""
        slots_NC = layout.slot_expert_S.reshape(layout.num_ranks, -1).copy()
        slots_NC[rank, slot] = expert
        # Received in ascending order, and empty slots are last.
        replicas_C = slots_NC[rank, self.planner.geometry.home_slots :]
        replicas_C[:] = sorted(replicas_C, key=lambda one: (one == EMPTY, one))
        return ExpertLayout.from_slots(*layout.shape, slots_NC.reshape(-1))

    def _seconds(self, layout: ExpertLayout, rows_per_token: float) -> float:
        return self.planner.price(self.counts_NE, layout, rows_per_token)[0]


def _as_microbatch(counts_NE: Int64, pairs_per_rank: int | None) -> Int64:
    """Scale counts to a microbatch's, if its size is known, and round up."""
    total = int(counts_NE.sum())
    if pairs_per_rank is None or total == 0:
        return counts_NE
    wanted = pairs_per_rank * len(counts_NE)
    scaled_NE: Int64 = np.ceil(counts_NE * (wanted / total)).astype(np.int64)
    return scaled_NE
