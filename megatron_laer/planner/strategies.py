"""Strategies are made by name here; each lives in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron_laer.arrays import Int64
from megatron_laer.config import (
    Auto,
    FixedPlanner,
    FSEPConfig,
    PlanMode,
)
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.laer import LaerStrategy
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.search import SearchStrategy
from megatron_laer.planner.static import StaticStrategy


class TimeTerms(NamedTuple):
    """Processor time by terms in seconds: always, per slot and per count `[N, E]`."""

    always_s: float
    slot_s: float
    count_s: float

    def seconds(self, geometry: Geometry) -> float:
        """Return the time for these sizes."""
        counts = geometry.num_ranks * geometry.num_experts
        return self.always_s + self.slot_s * geometry.num_slots + self.count_s * counts


class Strategy(Protocol):
    """Pure function from observed counts and the layout in use to the next layout."""

    @property
    def name(self) -> str:
        """Return the name under which `make_strategy` knows it."""
        ...

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Return the next layout.

        Args:
            counts_NE: tokens on each source rank for each expert, int64 [N, E]; not to be changed.
            current: the layout in use; return it to keep it.
        """
        ...


def strategy_names() -> tuple[str, ...]:
    """Return the names that `make_strategy` takes, sorted."""
    return tuple(sorted(_STRATEGIES))


def described_strategies() -> str:
    """Return all names for the help of a flag, each with what sets the strategy apart."""
    return "; ".join(
        f"{name} ({_STRATEGIES[name].about})" if _STRATEGIES[name].about else name
        for name in strategy_names()
    )


def plan_time(name: str) -> TimeTerms:
    """Return what one call of the strategy's `plan` takes, roughly."""
    return _STRATEGIES[name].plan_time


def check_planner(name: str) -> None:
    """Refuse what names neither a strategy nor a planner that needs none."""
    known = sorted({*strategy_names(), *FixedPlanner})
    if name not in known:
        raise ValueError(f"--fsep-planner {name}: unknown planner; use one of {', '.join(known)}")


def make_strategy(name: str, *, geometry: Geometry, costs: CostModel) -> Strategy:
    """Build a strategy by name."""
    if name not in _STRATEGIES:
        raise ValueError(f"unknown planner {name!r}; use one of {', '.join(strategy_names())}")
    return _STRATEGIES[name].make(geometry, costs)


def uses_costs(config: FSEPConfig) -> bool:
    """Return whether the cost model decides anything under these settings."""
    strategy = _STRATEGIES.get(config.planner)
    return (
        (config.mode == PlanMode.ADAPTIVE and config.imbalance_tolerance is None)
        or (config.makes_plans and strategy is not None and strategy.uses_costs)
        or config.restore_algorithm == Auto.AUTO
        or config.token_exchange == Auto.AUTO
    )


# No strategy below is slower in any term; one that nobody measured is taken to be as slow.
_SLOWEST = TimeTerms(2e-2, 5e-5, 1e-6)


@dataclass(frozen=True)
class _Registered:
    """Constructor of a strategy, and its properties for others.

    Attributes:
        uses_costs: whether it compares layouts by the cost model.
        plan_time: what `plan` refuses work by that would take too long.
        about: a few words for the help of `--fsep-planner`.
    """

    make: Callable[[Geometry, CostModel], Strategy]
    uses_costs: bool = False
    plan_time: TimeTerms = _SLOWEST
    about: str = ""


# Times were measured on one core of a server of 2023 with skewed counts, from 8 ranks with 8
# experts to 8192 with 256 and 1024 with 2048, 2 to 8 slots; most are right within a factor of
# three.
_STRATEGIES: Mapping[str, _Registered] = {
    "greedy": _Registered(GreedyStrategy, uses_costs=True, plan_time=TimeTerms(2e-4, 8e-6, 3e-7)),
    "laer": _Registered(
        LaerStrategy, uses_costs=True, plan_time=TimeTerms(5e-4, 3e-5, 8e-7), about="the paper's"
    ),
    "search": _Registered(
        lambda geometry, costs: SearchStrategy(geometry), plan_time=_SLOWEST, about="slower"
    ),
    "static": _Registered(
        lambda geometry, costs: StaticStrategy(geometry), plan_time=TimeTerms(1e-4, 0.0, 0.0)
    ),
}
