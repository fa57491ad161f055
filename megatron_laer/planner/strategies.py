"""Registry of strategies by name; each strategy has a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from megatron_laer.arrays import Int64
from megatron_laer.choices import Auto, FixedPlanner, PlanMode, Sharding
from megatron_laer.config import FSEPConfig, setting
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.laer import LaerStrategy, even_replicas, proportional_replicas
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.static import StaticStrategy
from megatron_laer.rules import LAER_PLANNER


class Strategy(Protocol):
    """Pure function from observed counts and the layout in use to the next layout."""

    @property
    def name(self) -> str:
        """Return the name under which `make_strategy` knows it."""
        ...

    def plan(self, counts_NE: Int64, current: ExpertLayout) -> ExpertLayout:
        """Return the next layout, or `current` to keep it.

        `counts_NE` are tokens on each source rank for each expert, int64 [N, E]; read only.
        """
        ...


def strategy_names() -> tuple[str, ...]:
    return tuple(sorted(_STRATEGIES))


def described_strategies() -> str:
    """Return all names for the help of a flag, each with its distinction."""
    return "; ".join(
        f"{name} ({_STRATEGIES[name].about})" if _STRATEGIES[name].about else name
        for name in strategy_names()
    )


def check_planner(name: str) -> None:
    """Refuse a name of neither a strategy nor a fixed planner."""
    known = sorted({*strategy_names(), *FixedPlanner})
    if name not in known:
        raise ValueError(
            f"{setting('planner', name)}: unknown planner; use one of {', '.join(known)}"
        )


def make_strategy(name: str, *, geometry: Geometry, costs: CostModel) -> Strategy:
    if name not in _STRATEGIES:
        raise ValueError(f"unknown planner {name!r}; use one of {', '.join(strategy_names())}")
    return _STRATEGIES[name].make(geometry, costs)


def uses_costs(config: FSEPConfig) -> bool:
    """Return whether the cost model decides anything under these settings."""
    return (
        (config.mode == PlanMode.ADAPTIVE and config.imbalance_tolerance is None)
        or config.makes_plans
        or config.sharding == Auto.AUTO
        # A replica of an expert at home is made if it pays, and so are further slots.
        or (config.sharding == Sharding.EXPERTS and config.planner not in FixedPlanner)
        or config.capacity is None
        or config.restore_algorithm == Auto.AUTO
        or config.token_exchange == Auto.AUTO
    )


@dataclass(frozen=True)
class _Registered:
    """Constructor of a strategy, and a few words about it for the help of `--fsep-planner`."""

    make: Callable[[Geometry, CostModel], Strategy]
    about: str = ""


_STRATEGIES: Mapping[str, _Registered] = {
    "greedy": _Registered(GreedyStrategy),
    LAER_PLANNER: _Registered(LaerStrategy, "the paper's, as released"),
    "laer-even": _Registered(
        partial(LaerStrategy, name="laer-even", schemes=(even_replicas,)),
        "its equal replicas alone",
    ),
    "laer-proportional": _Registered(
        partial(LaerStrategy, name="laer-proportional", schemes=(proportional_replicas,)),
        "its replicas by load alone",
    ),
    "static": _Registered(lambda geometry, costs: StaticStrategy(geometry)),
}
