"""Layouts by pairs of a planner's layers: which pairs are in use, and when layers get layouts.

Making all layouts at once would hold up plans for long. So some layers get theirs after each
planned step, and all do before the next pairs. That order depends on steps alone, not on time, so
that a run and its resumes have the same plans.

Legend: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_laer.arrays import Int64
from megatron_laer.planner.by_pairs import Choice, PairPlanner, PlacedPairs
from megatron_laer.planner.layout import ExpertLayout


class PairLayouts:
    """Pairs and layouts of the layers of one service, whose lock guards all but `place_due`.

    There is a planner for each layer, and layers are numbered from 0 here. `placed` are an earlier
    service's.
    """

    def __init__(
        self,
        planners: Sequence[PairPlanner],
        placed: PlacedPairs | None = None,
        check_layout: Callable[[ExpertLayout], None] | None = None,
    ) -> None:
        self.placed = placed
        self._planners = planners
        self._check_layout = check_layout
        self._new: dict[int, Int64] = {}
        self._by_counts: dict[int, tuple[Int64, ExpertLayout]] = {}

    def submit(self, step: int, pairs_LEE: Int64) -> None:
        """Keep a copy of a step's pairs, for plans from the counts of later steps only."""
        experts, layers = self._planners[0].geometry.num_experts, len(self._planners)
        if pairs_LEE.shape != (layers, experts, experts):
            raise ValueError(
                f"pairs_LEE of step {step} has shape {pairs_LEE.shape}, expected [layers, experts, "
                f"experts] = {(layers, experts, experts)}"
            )
        self._new[step] = pairs_LEE.copy()

    def use_before(self, step: float) -> None:
        """Use the newest pairs of steps before this one."""
        for at in sorted(at for at in self._new if at < step):
            pairs_LEE = self._new.pop(at)
            self.placed = (
                PlacedPairs.first(pairs_LEE)
                if self.placed is None
                else self.placed.renewed(pairs_LEE)
            )

    def faster(self, layer: int, counts_NE: Int64, by_counts: ExpertLayout) -> Choice:
        """Return the faster of the strategy's layout and the layer's layout by pairs."""
        self._by_counts[layer] = counts_NE, by_counts
        if self.placed is None:
            return Choice(by_counts)
        by_pairs = self.placed.layouts[layer]
        pairs_EE = self.placed.pairs_LEE[layer]
        return self._planners[layer].choose(counts_NE, by_counts, by_pairs, pairs_EE)

    def place_due(self) -> Iterator[str | None]:
        """Make the layouts that are due after a planned step; yield each one's problem or None."""
        if self.placed is None:
            return
        due = self._planners[0].layers_per_step(len(self._planners))
        for layer in self.placed.waiting[:due]:
            layout, problem = None, None
            try:
                pairs_EE = self.placed.pairs_LEE[layer]
                layout = self._planners[layer].place(pairs_EE, *self._by_counts[layer])
                if layout is not None and self._check_layout is not None:
                    self._check_layout(layout)
            except Exception as error:  # as of a strategy: the layer keeps what it has
                problem, layout = f"{type(error).__name__}: {error}", self.placed.layouts[layer]
            self.placed = self.placed.placed(layer, layout)
            yield problem
