"""Layout of each pass of a layer before the gate, and the decision after it.

A plan mode is one such object. This one serves `forecast`, `exact` and `adaptive`, which differ in
the guard's choice after the gate; `announced_layouts` has the fourth.

Legend: N ranks, E experts, M microbatches, L layers, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_laer.arrays import Int64
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.planning.layouts_in_force import LayoutsInForce

# Returns the experts that routers will choose in the next forward pass of a chunk, int [T, K] for
# each layer, or None without replay.
Replayed = Callable[[], Sequence[torch.Tensor] | None]


@dataclass(frozen=True)
class LayerPass:
    """One forward pass of a layer, with its number among the layer's passes of the step."""

    layer: int
    number: int
    microbatch: int
    training: bool


@dataclass(eq=False)
class PassLayouts:
    """Layouts in force, each kept or replaced after the gate.

    With `one_per_step` all passes of a layer in one step have the same layout, even a random one.
    `misses` counts passes whose routing differed from the announced one; None without
    announcements.
    """

    guard: Guard
    in_force: LayoutsInForce
    groups: FSEPGroups
    one_per_step: bool
    misses: int | None = None

    def begin_step(
        self, step: int, num_microbatches: int | None, num_layers: int, *, replays: bool
    ) -> int | None:
        return num_microbatches

    def known(self, passes: Sequence[LayerPass]) -> dict[int, ExpertLayout]:
        """Return the layouts that are known when the step of these passes begins, by layer."""
        return {each.layer: self.layout_for(each) for each in passes}

    def begin_forward(self, passes: Sequence[LayerPass], replayed: Replayed | None) -> None:
        """Begin the training forward of a chunk with these passes."""

    def is_known(self, layer_pass: LayerPass) -> bool:
        """Return whether a pass's layout is known before its chunk's forward begins."""
        return True

    def layout_for(self, layer_pass: LayerPass) -> ExpertLayout:
        draw = 0 if self.one_per_step else layer_pass.number
        return self.in_force.of_pass(layer_pass.layer, draw, training=layer_pass.training)

    def decide(self, layer_pass: LayerPass, counts_NE: Int64, planned: ExpertLayout) -> Decision:
        guard = self.in_force.guard_of(layer_pass.layer, self.guard)
        return guard.decide(counts_NE, planned, self.groups.rank)

    def close(self) -> None:
        """Release resources."""
