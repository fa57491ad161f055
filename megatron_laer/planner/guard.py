"""Choice after the gate between the planned layout and a fresh one for a microbatch's counts.

A pure function of these counts, the same on every rank: integers, and the cost model's floats,
which are equal everywhere (see `costs`). The choice itself is in `native/guard.hpp`.

Legend: N ranks, E experts, S slots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_laer.arrays import Int64
from megatron_laer.choices import PlanMode, Split
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean
from megatron_laer.planner.construct import from_native
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import ExactQuotas
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout, check_rank
from megatron_laer.planner.native_core import native
from megatron_laer.planner.splits import Quotas, RankQuotas, solve_quotas

# Modes that choose after the gate.
GUARD_MODES = (PlanMode.FORECAST, PlanMode.EXACT, PlanMode.ADAPTIVE)


@dataclass(frozen=True, eq=False)
class Decision:
    """Layout of one microbatch of one layer, and the reason for it.

    Attributes:
        planned_quotas: quotas of the planned layout; None under `exact`, which needs none.
        rank_quotas: part of `quotas` for the rank that asked.
        solved: whether a fresh layout was made, even if it was not chosen.
        gain_s: predicted time saved by the fresh layout, in the layer, in exposed exchanges of
            backward and on the host. None where costs did not decide. Without `solved`, an upper
            bound for any layout; for home experts, the time that perfect balance would save.
        cost_s: cost of the change; None with `gain_s`. Without `solved`, a lower bound.
        tolerance, as_announced: grounds of the choice, None in other modes.
    """

    layout: ExpertLayout
    quotas: Quotas
    planned_layout: ExpertLayout
    planned_quotas: Quotas | None
    rank_quotas: RankQuotas
    solved: bool
    gain_s: float | None = None
    cost_s: float | None = None
    tolerance: float | None = None
    as_announced: bool | None = None

    @property
    def replanned(self) -> bool:
        """Return True if slots have to be fetched for this layout."""
        return self.layout is not self.planned_layout

    @cached_property
    def changed_slots(self) -> int:
        """Return the number of slots with another expert than in the planned layout."""
        return int(self.layout.changed_from(self.planned_layout).sum())

    @cached_property
    def max_over_mean_before(self) -> float | None:
        """Return max/mean rank load of the planned layout; None where that was not solved."""
        return None if self.planned_quotas is None else _imbalance(self.planned_quotas)

    @cached_property
    def max_over_mean_after(self) -> float:
        return _imbalance(self.quotas)

    @property
    def reason(self) -> str:
        """Return the decision in words for the log, without the layer's name."""
        ratio = f"max/mean {self.max_over_mean_after:.2f}"
        if self.as_announced is not None:
            return f"{'as' if self.as_announced else 'not as'} announced: {ratio}"
        if self.replanned:
            if self.max_over_mean_before is not None:
                ratio = f"max/mean {self.max_over_mean_before:.2f} -> {ratio[9:]}"
            costs = f", {self._costs()}" if self.gain_s is not None else ""
            slots = f"{self.changed_slots} slot{'' if self.changed_slots == 1 else 's'} changed"
            return f"fresh layout: {ratio}{costs} ({slots})"
        if self.gain_s is not None:
            return f"kept forecast: {self._costs()}"
        if self.solved:
            return f"kept forecast: {ratio}, a fresh layout is no better"
        if self.tolerance is not None and self.max_over_mean_after > 1.0 + self.tolerance:
            return f"kept forecast: {ratio}, the least for so few tokens"
        if self.tolerance is not None:
            return f"kept forecast: {ratio}, tolerance {1 + self.tolerance:.2f}"
        return f"forecast: {ratio}"

    def _costs(self) -> str:
        assert self.gain_s is not None and self.cost_s is not None
        most, least = ("", "") if self.solved else ("at most ", "at least ")
        sign = ">" if self.gain_s > self.cost_s else "<" if self.gain_s < self.cost_s else "="
        gain, cost = f"{self.gain_s * 1e3:.1f} ms", f"{self.cost_s * 1e3:.1f} ms"
        return f"gain {most}{gain} {sign} cost {least}{cost}"


def in_words(decisions: Mapping[str, Decision]) -> str:
    """Summarise one decision per layer; explain the one with the largest gain or imbalance."""
    kinds = Counter(decision.reason.split(":")[0] for decision in decisions.values())
    counts = ", ".join(f"{kind} in {n} layer{'s' if n > 1 else ''}" for kind, n in kinds.items())

    def weight(name: str) -> tuple[float, float]:
        decision = decisions[name]
        gain_s = -math.inf if decision.gain_s is None else decision.gain_s
        return gain_s, decision.max_over_mean_before or decision.max_over_mean_after

    name = max(decisions, key=weight)
    return f"{counts}; {name}: {decisions[name].reason}"


@dataclass(frozen=True)
class Guard:
    """Choice between a microbatch's planned and fresh layout, by `mode`.

    - `forecast`: the planned one, always.
    - `exact`: a fresh one, always; it needs the exact split.
    - `adaptive`: the fresh one if it saves more predicted seconds than the change costs. With a
      tolerance x instead: if the planned one's largest load exceeds (1 + x) times the mean and the
      fresh one's is smaller.
    """

    mode: PlanMode
    costs: CostModel
    geometry: Geometry
    tolerance: float | None = None
    split: Split = Split.EXACT

    def __post_init__(self) -> None:
        assert self.mode in GUARD_MODES, f"plan mode '{self.mode}' chooses nothing after the gate"
        if self.mode != PlanMode.FORECAST and self.split == Split.EVEN:
            raise ValueError(
                f"plan mode '{self.mode}' makes layouts for the exact split, got split "
                f"'{self.split}'; use split '{Split.EXACT}' or plan mode '{PlanMode.FORECAST}'"
            )
        if self.tolerance is not None and self.mode != PlanMode.ADAPTIVE:
            raise ValueError(
                f"a tolerance of {self.tolerance} has no effect on plan mode '{self.mode}'; use "
                f"plan mode '{PlanMode.ADAPTIVE}'"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < self.geometry.num_ranks:
            raise ValueError(
                f"tolerance {self.tolerance}: must be at least 0 and less than the number of ranks "
                f"({self.geometry.num_ranks}), since no rank has more than all tokens"
            )

    def decide(self, counts_NE: Int64, planned: ExpertLayout, rank: int = 0) -> Decision:
        """Choose the layout and quotas of one microbatch; only `rank_quotas` depend on `rank`.

        With the exact split, all of it is one native call without the GIL.
        """
        geometry = self.geometry
        _check_layout(geometry, planned)
        geometry.check_counts(counts_NE.shape)
        check_rank(geometry.num_ranks, rank)
        if self.split == Split.EVEN:
            even = solve_quotas(self.split, counts_NE, planned, geometry.node_size)
            mine = RankQuotas.of(planned, even.rank_row(rank), even.rank_columns(rank))
            return Decision(planned, even, planned, even, mine, solved=False)
        fresh, loads_S, kept_loads_S, solved, gain_s, cost_s, of_rank = native.decide(
            self.mode,
            self._native_costs,
            self.tolerance,
            counts_NE,
            planned.slot_expert_S,
            geometry.node_size,
            geometry.home_slots,
            rank,
        )
        layout = planned if fresh is None else from_native(fresh, planned)
        size = geometry.node_size
        quotas = ExactQuotas(layout, size, counts_NE, loads_S)
        kept: ExactQuotas | None = quotas
        if kept_loads_S is not None:
            kept = ExactQuotas(planned, size, counts_NE, kept_loads_S)
        elif self.mode == PlanMode.EXACT:
            kept = None
        mine = RankQuotas(*of_rank)
        return Decision(layout, quotas, planned, kept, mine, solved, gain_s, cost_s, self.tolerance)

    @cached_property
    def in_bf16(self) -> Guard:
        """Return the guard of layers whose experts are not quantised."""
        return replace(self, costs=self.costs.in_bf16)

    @cached_property
    def keeping(self) -> Guard:
        """Return the guard that keeps each planned layout."""
        return replace(self, mode=PlanMode.FORECAST, tolerance=None)

    @cached_property
    def _native_costs(self) -> native.CostModel:
        return self.costs.for_native(self.geometry)


# Called in each pass, mostly for a layout that was checked before; a refusal is not kept.
@lru_cache(maxsize=256)
def _check_layout(geometry: Geometry, planned: ExpertLayout) -> None:
    geometry.check_layout(planned)


def _imbalance(quotas: Quotas) -> float:
    return max_over_mean(fsep_tokens_N(quotas))
