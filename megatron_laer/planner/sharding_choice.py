"""Choice of `--fsep-sharding auto` and of a rank's slots, by predicted time.

Candidates are priced for typical counts, with the planner's layout: a layer and microbatch with all
exchanges of weights and gradients. Memory is the same but for the slots. Replica slots must also
serve skewed routing: where all hot experts share a home, they need slots on other ranks. So the
worst of few shapes is priced too. Rows need more than the fewest slots only to keep tokens on their
node.

Legend: N ranks, E experts, C slots per rank, G ranks per node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_laer.arrays import Int64
from megatron_laer.choices import Auto, FixedPlanner, OverlapScheduler, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.typical import skewed_counts_NE, typical_counts_NE

# Replica slots per rank that are compared in any case.
_REPLICA_SLOTS = 3
# Part of a card's memory that all but the first may take for skewed routing, with weights and
# gradients of two layers each.
_MEMORY_PART = 1 / 64
_COPIES = 4
# Draws of typical counts, of which the mean counts.
DRAWS = 4
# Part of a layer's time that further slots, which take memory on every rank, must save.
_WORTH = 0.01


@dataclass(frozen=True)
class Candidate:
    """Sharding and slots, their prices, and the predicted seconds of a layer and microbatch.

    `worst_s` are those of the slowest skewed routing, for experts at home.
    """

    geometry: Geometry
    costs: CostModel
    seconds: float
    worst_s: float = 0.0

    def is_worth_more_than(self, fewer: Candidate) -> bool:
        """Return whether more slots save enough time, and none over all.

        For skewed routing, which is rare, they may take little memory only.
        """
        saves_enough = self.seconds < fewer.seconds * (1.0 - _WORTH)
        if self.takes_little_memory:
            saves_enough |= self.worst_s < fewer.worst_s * (1.0 - _WORTH)
        return saves_enough and self.seconds + self.worst_s < fewer.seconds + fewer.worst_s

    @property
    def takes_little_memory(self) -> bool:
        card, more_slots = self.costs.cluster.card, self.geometry.replica_slots - 1
        more_bytes = more_slots * _COPIES * self.costs.grads_form.expert_bytes
        return card is None or more_bytes <= card.memory_gib * 2**30 * _MEMORY_PART

    def __str__(self) -> str:
        slots = f"{self.geometry.capacity} slots"
        return f"{self.geometry.sharding} ({slots}: {self.seconds * 1e3:.3g} ms per layer)"


def choose_geometry(
    config: FSEPConfig,
    shape: tuple[int, int, int],
    multiple: int,
    top_k: int,
    priced: Callable[[Geometry], CostModel],
) -> tuple[Candidate, list[Candidate]]:
    """Choose sharding and slots; return the choice, and the best candidate of each sharding.

    Args:
        shape: N, E, and ranks per node.
        multiple: number of which N*C must be a multiple.
        top_k: experts of a token.
        priced: returns the prices of a geometry, with its exchanges.
    """
    num_ranks, num_experts, node_size = shape

    def geometry(sharding: Sharding, capacity: int | None) -> Geometry:
        return resolve_geometry(
            num_experts, num_ranks, capacity, node_size, sharding=sharding, multiple=multiple
        )

    asked = shardings(config, num_ranks, num_experts)
    only = geometry(asked[0], config.capacity)
    if len(asked) == 1 and (config.capacity is not None or not _more_slots(only)):
        return Candidate(only, priced(only), 0.0), []
    best = []
    for sharding in asked:
        least = geometry(sharding, config.capacity)
        found = _candidate(config, least, priced, top_k)
        for capacity in _more_slots(least) if config.capacity is None else ():
            if capacity > num_experts or capacity * num_ranks % multiple:
                continue
            more = _candidate(config, geometry(sharding, capacity), priced, top_k)
            if more.is_worth_more_than(found):
                found = more
        best.append(found)
    if len(best) == 1:
        return best[0], []
    # Rows move every expert, and contention is seldom measured: they must be clearly faster.
    at_home, rows = best[0], best[-1]
    return (rows if rows.seconds < at_home.seconds * (1.0 - _WORTH) else at_home), best


def _more_slots(least: Geometry) -> list[int]:
    """Return the numbers of slots to compare, above the fewest that balance."""
    if home := least.home_slots:
        # Where half of the ranks have no tokens, each takes half of the experts of another.
        wanted = -(-home // 2)
        return list(range(least.capacity + 1, home + max(wanted, _REPLICA_SLOTS) + 1))
    if least.num_nodes == 1:
        return []
    # With these a node has every expert, and a slot of each rank for replicas.
    whole = -(-least.num_experts // least.node_size) + 1
    few = range(least.capacity + 1, least.capacity + _REPLICA_SLOTS)
    return sorted({*few, (least.capacity + whole) // 2, whole} - {least.capacity})


def shardings(config: FSEPConfig, num_ranks: int, num_experts: int) -> list[Sharding]:
    """Return the shardings that a run may take, which `auto` compares."""
    if config.sharding != Auto.AUTO:
        return [Sharding(config.sharding)]
    home, uneven = divmod(num_experts, num_ranks)
    has_replicas = config.capacity is None or config.capacity > home
    if uneven or num_ranks == 1 or not has_replicas:
        return [Sharding.ROWS]
    return [Sharding.EXPERTS, Sharding.ROWS]


def _candidate(
    config: FSEPConfig, geometry: Geometry, priced: Callable[[Geometry], CostModel], top_k: int
) -> Candidate:
    costs = priced(geometry)
    pairs = costs.pairs_per_rank
    typical_s = worst_s = 0.0
    for draw in range(DRAWS):
        counts_NE = typical_counts_NE(geometry, pairs, draw)
        typical_s += planned_seconds(config, geometry, costs, counts_NE) / DRAWS
    if geometry.home_slots:
        skewed = skewed_counts_NE(geometry, top_k, pairs)
        worst_s = max(planned_seconds(config, geometry, costs, counts_NE) for counts_NE in skewed)
    return Candidate(geometry, costs, typical_s, worst_s)


def planned_seconds(
    config: FSEPConfig, geometry: Geometry, costs: CostModel, counts_NE: Int64
) -> float:
    """Predict a layer and microbatch, with exchanges, under the layout planned for its counts."""
    layout = geometry.static_layout
    if config.planner != FixedPlanner.STATIC:
        layout = GreedyStrategy(geometry, costs).plan(counts_NE, layout)
    placed = Placed(layout, geometry)
    layer_s = costs.layer_seconds(counts_NE, placed, config.split)
    hiding_s = layer_s if config.scheduler == OverlapScheduler.ON else 0.0
    return layer_s + costs.exchanges_seconds(placed, hiding_s)
