"""Layouts solved ahead, each for the announced counts of its microbatch.

Every rank solves the same layouts from the same counts, in a thread, in the order of their use:
nothing is broadcast. After the gate, counts are only compared. Routers are not affected.

Legend: M microbatches of a step, L MoE layers of this rank, N ranks, E experts, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.choices import PlanMode
from megatron_laer.planner.exact import ExactQuotas
from megatron_laer.planner.guard import Decision, Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.comm.collectives import gather_integers
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.planning.layouts_in_force import LayoutsInForce
from megatron_laer.runtime.planning.pass_layouts import LayerPass, PassLayouts, Replayed


class AnnouncedLayouts(PassLayouts):
    """Decisions made ahead for announced counts; the guard keeps their layouts on a mismatch."""

    misses: int

    def __init__(
        self, guard: Guard, in_force: LayoutsInForce, groups: FSEPGroups, device: torch.device
    ) -> None:
        super().__init__(guard, in_force, groups, one_per_step=False, misses=0)
        self._ahead = replace(guard, mode=PlanMode.EXACT)
        self._device = device
        self._static = guard.geometry.static_layout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fsep-announced")
        self._given_MLE: torch.Tensor | None = None
        self._awaits_replay = False
        self._step: int | None = None
        # Decisions by layer and microbatch of the step.
        self._decisions: dict[tuple[int, int], Future[Decision]] = {}

    def announce(self, counts_MLE: torch.Tensor, num_layers: int) -> None:
        """Store the choices of this rank's routers in the next step; no collective."""
        num_experts = self.guard.geometry.num_experts
        shape = tuple(counts_MLE.shape)
        is_shaped = len(shape) == 3 and shape[1:] == (num_layers, num_experts)
        if counts_MLE.dtype not in _INTEGERS or not is_shaped:
            raise ValueError(
                f"announce_routing got {counts_MLE.dtype} {list(shape)}: must be integers "
                f"[microbatches, {num_layers}, {num_experts}], tokens of this rank for each expert "
                f"in its {num_layers} MoE layers"
            )
        if counts_MLE.numel() and int(counts_MLE.min()) < 0:
            raise ValueError(
                f"announce_routing got {int(counts_MLE.min())} tokens for an expert: must be at "
                "least 0"
            )
        self._given_MLE = counts_MLE

    def begin_step(
        self, step: int, num_microbatches: int | None, num_layers: int, *, replays: bool
    ) -> int | None:
        """Exchange the ranks' announcements for this step, and start to solve. Collective.

        Args:
            num_microbatches: of the step; None for the announced number.
            replays: whether Megatron's router replay may announce each microbatch instead.

        Returns:
            The number of microbatches, if already known.
        """
        given_MLE, self._given_MLE = self._given_MLE, None
        self._step = step
        for decision in self._decisions.values():
            decision.cancel()  # announced, but not run
        self._decisions.clear()
        announced = torch.tensor([0 if given_MLE is None else len(given_MLE)])
        announced_N = gather_integers(announced, self.groups, self._device)[:, 0]
        self._awaits_replay = replays and not announced_N.any()
        if self._awaits_replay:
            return num_microbatches
        expected = announced_N.max() if num_microbatches is None else num_microbatches
        if (announced_N != max(1, expected)).any():
            number = "as many" if num_microbatches is None else num_microbatches
            raise ValueError(
                f"FSEP step {step}: {number} microbatches must be announced on every rank, and the "
                f"ranks {self.groups.ranks} announced {announced_N.tolist()}. {_HOW}"
            )
        assert given_MLE is not None
        num_microbatches = len(given_MLE)
        counts_NMLE = gather_integers(given_MLE, self.groups, self._device)
        for microbatch in range(num_microbatches):
            for layer in range(num_layers):
                self._solve_ahead(layer, microbatch, counts_NMLE[:, microbatch, layer])
        return num_microbatches

    def known(self, passes: Sequence[LayerPass]) -> dict[int, ExpertLayout]:
        """Return nothing: each microbatch has its own layout, perhaps not solved yet."""
        return {}

    def begin_forward(self, passes: Sequence[LayerPass], replayed: Replayed | None) -> None:
        """Exchange the routers' replayed choices, if the step awaits them. Collective then."""
        if not self._awaits_replay:
            return
        num_experts = self.guard.geometry.num_experts
        experts_TK = None if replayed is None else replayed()
        if experts_TK is None:
            mine_LE = torch.full((len(passes), num_experts), -1)
        else:
            mine_LE = _counts(torch.stack(list(experts_TK)), num_experts)
        counts_NLE = gather_integers(mine_LE, self.groups, self._device)
        silent_N = (counts_NLE < 0).any(axis=(1, 2))
        if silent_N.any():
            silent = [self.groups.ranks[place] for place in np.flatnonzero(silent_N)]
            raise ValueError(
                f"FSEP step {self._step}, microbatch {passes[0].microbatch}: no routing is "
                f"announced on ranks {silent}. {_HOW}"
            )
        for each, counts_NE in zip(passes, counts_NLE.transpose(1, 0, 2), strict=True):
            self._solve_ahead(each.layer, each.microbatch, counts_NE)

    def is_known(self, layer_pass: LayerPass) -> bool:
        return not self._awaits_replay

    def layout_for(self, layer_pass: LayerPass) -> ExpertLayout:
        """Wait for the layout that was solved ahead; outside of steps, return the one in force."""
        ahead = self._decided(layer_pass)
        return super().layout_for(layer_pass) if ahead is None else ahead.layout

    def decide(self, layer_pass: LayerPass, counts_NE: Int64, planned: ExpertLayout) -> Decision:
        ahead = self._decided(layer_pass)
        if ahead is None:
            return super().decide(layer_pass, counts_NE, planned)
        quotas = ahead.quotas
        assert isinstance(quotas, ExactQuotas)
        if np.array_equal(quotas.counts_NE, counts_NE):
            return ahead
        self.misses += 1
        return replace(super().decide(layer_pass, counts_NE, ahead.layout), as_announced=False)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _decided(self, layer_pass: LayerPass) -> Decision | None:
        if not layer_pass.training or self._step is None:
            return None
        if layer_pass.layer in self.in_force.at_stock:
            return None
        return self._decisions[layer_pass.layer, layer_pass.microbatch].result()

    def _solve_ahead(self, layer: int, microbatch: int, counts_NE: Int64) -> None:
        counts_NE = np.ascontiguousarray(self.in_force.homes[layer].by_position(counts_NE))
        self._decisions[layer, microbatch] = self._thread.submit(self._solve, layer, counts_NE)

    def _solve(self, layer: int, counts_NE: Int64) -> Decision:
        guard = self.in_force.guard_of(layer, self._ahead)
        made = guard.decide(counts_NE, self._static, self.groups.rank)
        return replace(
            made, planned_layout=made.layout, planned_quotas=made.quotas, as_announced=True
        )


def _counts(experts_LTK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count the tokens of each layer's experts at once; a token counts once per expert."""
    num_layers = len(experts_LTK)
    layer_L = torch.arange(num_layers, device=experts_LTK.device)
    numbered = (experts_LTK + num_experts * layer_L[:, None, None]).sort(dim=-1).values
    size = num_layers * num_experts
    numbered[..., 1:][numbered[..., 1:] == numbered[..., :-1]] = size
    return torch.bincount(numbered.flatten(), minlength=size)[:size].view(num_layers, -1)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_HOW = (
    "With --fsep-plan-mode announced, every rank calls megatron_laer.announce_routing before each "
    "step; or it gives --moe-enable-routing-replay, passes the model to training_step, and sets "
    "the target indices and the action REPLAY_FORWARD of Megatron's RouterReplay before each "
    "microbatch's forward. Routing that nobody knows before needs another --fsep-plan-mode"
)
