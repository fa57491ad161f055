"""What happens to a planned layout once the counts of a microbatch are known, by mode.

Shape suffixes: N ranks, E experts, S slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.construct import construct_layout
from megatron_laer.planner.quotas import Int64


@dataclass(frozen=True)
class Decision:
    """The layout that a microbatch is computed with.

    Attributes:
        layout: the layout.
        fetched_slots: slots of the busiest rank that are restored after the gate, because the
            layout that was restored ahead held other experts there.
        plan_s: time on the critical path that the decision took, in seconds.
    """

    layout: ExpertLayout
    fetched_slots: int = 0
    plan_s: float = 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether something has to be restored after the gate."""
        return self.fetched_slots > 0


Mode = Callable[[Int64, ExpertLayout, int], Decision]
"""(counts_NE, the layout planned for this step, node size) → decision."""


def mode_names() -> tuple[str, ...]:
    """Names that `mode_by_name` takes."""
    return tuple(_MODES)


def mode_by_name(name: str) -> Mode:
    """The mode of this name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in _MODES:
        raise ValueError(f"unknown mode {name!r}; use one of {', '.join(mode_names())}")
    return _MODES[name]


def keep_forecast(counts_NE: Int64, planned: ExpertLayout, node_size: int) -> Decision:
    """The planned layout, whatever the counts are."""
    return Decision(planned)


def always_fresh(counts_NE: Int64, planned: ExpertLayout, node_size: int) -> Decision:
    """A layout made for these counts, after the gate; slots that agree with the plan are kept."""
    start_s = time.perf_counter()
    fresh = construct_layout(counts_NE, planned, node_size)
    plan_s = time.perf_counter() - start_s
    return Decision(fresh, changed_slots(planned, fresh), plan_s)


def changed_slots(before: ExpertLayout, after: ExpertLayout) -> int:
    """The most slots of one rank that hold another expert than before."""
    changed_S = before.slot_expert_S != after.slot_expert_S
    return int(changed_S.reshape(before.num_ranks, -1).sum(axis=1).max())


_MODES: Mapping[str, Mode] = {"forecast": keep_forecast, "exact": always_fresh}
