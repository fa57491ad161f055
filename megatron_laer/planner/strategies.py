"""What a planning strategy is, and the strategies by name; each lives in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_laer.config import FIXED_PLANNERS
from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.laer import LaerStrategy
from megatron_laer.planner.search import SearchStrategy
from megatron_laer.planner.static import StaticStrategy


class Strategy(Protocol):
    """Observed counts and the layout in use → the next layout. A pure function."""

    @property
    def name(self) -> str:
        """The name under which `make_strategy` knows it."""
        ...

    def plan(self, counts_NE: npt.NDArray[np.int64], current: ExpertLayout) -> ExpertLayout:
        """The next layout.

        Args:
            counts_NE: tokens on each source rank for each expert, int64 [N, E]; not to be changed.
            current: the layout in use; return it to keep it.
        """
        ...


def strategy_names() -> tuple[str, ...]:
    """Names that `make_strategy` takes, sorted."""
    return tuple(sorted(_STRATEGIES))


def check_planner(name: str) -> None:
    """Refuse what names neither a strategy nor a planner that needs none.

    Raises:
        ValueError: quoting it; the message lists the known ones.
    """
    known = sorted({*strategy_names(), *FIXED_PLANNERS})
    if name not in known:
        raise ValueError(f"--fsep-planner {name}: unknown planner; use one of {', '.join(known)}")


def make_strategy(name: str, *, geometry: Geometry, costs: CostModel) -> Strategy:
    """Build a strategy by name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in _STRATEGIES:
        raise ValueError(f"unknown planner {name!r}; use one of {', '.join(strategy_names())}")
    return _STRATEGIES[name](geometry, costs)


_STRATEGIES: Mapping[str, Callable[[Geometry, CostModel], Strategy]] = {
    "greedy": lambda geometry, costs: GreedyStrategy(geometry),
    "laer": LaerStrategy,
    "search": lambda geometry, costs: SearchStrategy(geometry),
    "static": lambda geometry, costs: StaticStrategy(geometry),
}
