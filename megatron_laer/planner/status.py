"""Condition of planning, counted on the planner's rank and reported on every rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlannerStatus:
    """Condition of the planner, for the metrics of every rank.

    Attributes:
        plan_us: planning time of the newest applied plan, over all layers.
        late_plans: plans so far that were not ready when they were due.
        failures: layers so far whose planning failed and that kept their layout.
    """

    plan_us: int = 0
    late_plans: int = 0
    failures: int = 0
