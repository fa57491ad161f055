"""`PlannerStatus` says how planning goes; the planner's rank counts it, every rank reports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannerStatus:
    """Condition of the planner, for the metrics of every rank.

    Attributes:
        plan_us: microseconds that the newest applied plan took to make, over all layers.
        late_plans: plans so far that were not ready when they were due.
        failures: layers so far whose planning failed and that kept their layout.
    """

    plan_us: int = 0
    late_plans: int = 0
    failures: int = 0
