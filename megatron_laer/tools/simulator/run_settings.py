"""Settings of a run whose routing is replayed: prices, shape and tolerance.

`tools/cli/prediction_input.py` makes them of flags and of a recording, so that `plan`, `report`
and its what-if replay one run alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_laer.choices import Auto, Dispatch, ExchangeAlgorithm, Sharding
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.token_exchange import choose_token_exchange, with_token_exchange
from megatron_laer.telemetry.metrics_file import Shape
from megatron_laer.tools.model_flags import ExpertSizes
from megatron_laer.tools.traces.records import Trace


def priced(
    costs: CostModel,
    of: tuple[Geometry, int, int],
    dispatch: Dispatch | Auto,
    algorithm: ExchangeAlgorithm | Auto,
) -> CostModel:
    """Return the prices of a geometry, top-k and a rank's tokens with the named exchanges.

    `auto` stands for the exchange that training takes by itself.
    """
    if isinstance(dispatch, Auto):
        dispatch = Dispatch(choose_token_exchange(costs, *of))
    return with_token_exchange(costs, dispatch, *of).with_exchange(algorithm, of[0])


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run, whose `costs` assume tokens that travel by rank.

    With `restore_algorithm` auto, exchanges are those that training takes by itself. `tolerance` is
    None without one. `shape` is the recorded one; its nodes are those of the recorded cluster, and
    do not hold for another one, as with `has_flag_cluster`.
    """

    sizes: ExpertSizes
    costs: CostModel
    restore_algorithm: ExchangeAlgorithm | Auto
    dispatch: Dispatch
    sharding: Sharding
    tolerance: float | None
    has_flag_cluster: bool
    shape: Shape | None

    def words(self) -> str:
        sent = "" if self.dispatch == Dispatch.RANK else f", tokens sent by {self.dispatch}"
        home = ", experts at home" if self.sharding == Sharding.EXPERTS else ""
        numbers = f"{self.costs.bytes_per_element} bytes per number"
        if self.costs.precision.is_quantised:
            numbers += f", {self.costs.precision} fp8"
        on = self.costs.cluster.name
        return f"experts of {self.sizes.widths}, {numbers}{sent}{home}, on {on}"

    def priced(self, trace: Trace, geometries: Iterable[Geometry]) -> dict[Geometry, CostModel]:
        """Return geometries as training plans them, each with its own prices."""
        top_k = min(self.sizes.top_k, trace.num_experts)
        tokens, named = trace.tokens_per_rank(top_k), (self.dispatch, self.restore_algorithm)
        return {of: priced(self.costs, (of, top_k, tokens), *named) for of in geometries}

    def geometries(
        self, num_ranks: int, num_experts: int, capacities: Sequence[int], node_size: int | None
    ) -> list[Geometry]:
        """Return the shapes, one per capacity.

        For the recorded number of ranks, sizes that were not given are the recorded ones.
        """
        shape = self.shape if self.shape and self.shape.num_ranks == num_ranks else None
        flag, cluster = "--node-size", self.costs.cluster
        if node_size is None and shape is not None and not self.has_flag_cluster:
            node_size = shape.node_size
        elif node_size is None:
            node_size = min(cluster.ranks_per_node, num_ranks)
            flag = f"--node-size is not given, and {cluster.name}'s"
        recorded: Sequence[int | None] = [None if shape is None else shape.capacity]
        return [
            resolve_geometry(
                num_experts,
                num_ranks,
                capacity,
                node_size,
                sharding=self.sharding,
                flags=("--capacity", flag),
            )
            for capacity in capacities or recorded
        ]
