"""Session: settings, process groups, coordinator and progress of FSEP in this process.

The plugin begins and ends the session. Nothing here touches Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_laer.choices import Auto, PlanMode, Sharding, TokenExchange
from megatron_laer.config import FSEPConfig, settings_in_force
from megatron_laer.runtime.build import build_coordinator, current_device
from megatron_laer.runtime.comm import agreement
from megatron_laer.runtime.comm.collectives import raise_everywhere
from megatron_laer.runtime.comm.process_groups import FSEPGroups, Group, create_groups
from megatron_laer.runtime.coordinator import Coordinator
from megatron_laer.runtime.planning import planner_checkpoint
from megatron_laer.runtime.planning.announced_layouts import AnnouncedLayouts
from megatron_laer.runtime.planning.stock_switch import StockSwitch
from megatron_laer.runtime.scheduler import Chunk
from megatron_laer.telemetry.log import RUN, say


class Session:
    """State of FSEP from `enable` until `disable`, or until `enable` with other settings.

    Without `seed`, the builder of the first layer decides the seed of the experts' weights. A
    pipeline stage without MoE layers has no coordinator. `can_skip` says whether the loop leaves
    out an optimizer's step on demand (`skips_step`).
    """

    can_skip = False

    def __init__(self, config: FSEPConfig, seed: int | None = None) -> None:
        self.config = config
        self.seed = seed
        self.coordinator: Coordinator | None = None
        self._groups: FSEPGroups | None = None
        self.in_force: Mapping[str, Any] = {}
        self.skips_step = False
        self._switch: StockSwitch | None = None
        self._is_training = False

    @property
    def has_groups(self) -> bool:
        return self._groups is not None

    @property
    def groups(self) -> FSEPGroups:
        """Return the FSEP groups; a RuntimeError before Megatron's parallel state exists."""
        if self._groups is None:
            raise RuntimeError(_NO_GROUPS)
        return self._groups

    @property
    def sharding(self) -> Sharding | Auto:
        """Return the sharding in force.

        It is `auto` until the first MoE layer is built, on a rank without one until the first step.
        """
        if self.coordinator is not None:
            return self.coordinator.geometry.sharding
        return Sharding(self.in_force["sharding"]) if self.in_force else self.config.sharding

    def create_groups(self, expert_group: Group, create_group: Callable[..., Group]) -> None:
        """Create the FSEP groups; collective over the world. See `process_groups.create_groups`."""
        self._groups = create_groups(
            expert_group,
            self.config.node_size,
            create_group,
            tokens_through_nodes=self.config.token_exchange != TokenExchange.RANK,
        )

    def coordinator_for(
        self, transformer_config: Any, seed: int | None, tokens: int | None
    ) -> Coordinator:
        """Return the coordinator, which is made when the first MoE layer is built.

        `seed` is for a session without one; None takes torch's seed of the group's rank 0.
        """
        experts = transformer_config.num_moe_experts
        if self.coordinator is None:
            seed = self.seed if self.seed is not None else seed
            self.coordinator = build_coordinator(
                self.config,
                self.groups,
                transformer_config,
                tokens=tokens,
                seed=seed if seed is not None else _common_seed(self.groups),
                device=current_device(),
            )
        elif self.coordinator.geometry.num_experts != experts:
            raise ValueError(
                f"MoE layers with {self.coordinator.geometry.num_experts} and with {experts} "
                "experts in one model: FSEP needs the same number in all of them"
            )
        return self.coordinator

    def begin_step(
        self, step: int, num_microbatches: int | None, chunks: Callable[[], Sequence[Chunk]]
    ) -> None:
        """Start a training step: see `Coordinator.begin_step`. Collective over the world.

        At the first step, problems of `Coordinator.start` become a ValueError on every rank. Steps
        are counted over the whole run, including resumed runs.
        """
        coordinator = self.coordinator
        if not self._is_training:
            raise_everywhere(None if coordinator is None else coordinator.start(step))
            held = None
            if coordinator is not None:
                homes = coordinator.layouts.given_homes
                in_force = settings_in_force(coordinator.config) | {"run": coordinator.layouts.run}
                held = in_force, homes.digest if homes else "stock's"
            self.in_force, problem = agreement.settings_of_all(held)
            raise_everywhere(problem)
            if coordinator is not None:
                coordinator.layouts.run = self.in_force["run"]
                coordinator.connect()
            # By the rank that prints Megatron's iterations, into whose log the number belongs.
            if self.in_force and dist.get_rank() == dist.get_world_size() - 1:
                say(f"FSEP: training begins, {RUN} {self.in_force['run']}")
            if self.config.makes_plans:
                resumption = None
                if coordinator is not None and coordinator.layers and self.groups.rank == 0:
                    resumption = coordinator.layouts.resumption
                planner_checkpoint.report_resumption(resumption, step)
            if coordinator is not None:
                coordinator.scheduler.attach(chunks())
            self._is_training = True
        self.skips_step = False
        if self._switch is None:
            self._switch = StockSwitch(self.config.stock_file, current_device())
        all_at_stock = self._switch.begin_step(step)
        if coordinator is not None:
            coordinator.begin_step(step, num_microbatches, all_at_stock=all_at_stock)

    def before_optimizer(self) -> None:
        """Verify the step's exchanges, once all its gradients are complete.

        With `verify=…,warn` this is collective over the world: a finding in any group makes all
        ranks skip the step.
        """
        found = False
        if self.coordinator is not None:
            found = self.coordinator.verifier.before_optimizer(can_skip=self.can_skip)
        if self.can_skip and self.config.verification.warns:
            any_found = torch.tensor([found], dtype=torch.int32, device=current_device())
            dist.all_reduce(any_found, op=dist.ReduceOp.MAX)
            self.skips_step = bool(any_found)

    def end_step(self) -> None:
        if self.coordinator is not None:
            self.coordinator.end_step()

    def close(self) -> None:
        """Close the coordinator, and destroy the groups; a later model starts anew."""
        coordinator, self.coordinator = self.coordinator, None
        groups, self._groups = self._groups, None
        self._is_training = False
        if coordinator is not None:
            coordinator.close()
        if groups is not None:
            groups.destroy()


_NO_GROUPS = (
    "the FSEP groups do not exist: call megatron_laer.enable(...) before "
    "parallel_state.initialize_model_parallel(...)"
)

_session: Session | None = None


def current() -> Session | None:
    return _session


def replace(session: Session | None) -> None:
    """Close the present session and start this one; None turns FSEP off."""
    global _session
    before, _session = _session, session
    if before is not None:
        before.close()


def current_coordinator() -> Coordinator | None:
    return None if _session is None else _session.coordinator


def get_fsep_group() -> Group:
    """Return the FSEP group of this rank: N ranks that together hold every expert of a layer.

    Raises:
        RuntimeError: while FSEP is off, or before Megatron's model parallel state was initialised.
    """
    if _session is None:
        raise RuntimeError(_NO_GROUPS)
    return _session.groups.tokens


def announce_routing(counts_MLE: Any) -> None:
    """Announce the choices of this rank's routers in the next step; without FSEP, do nothing.

    For `--fsep-plan-mode announced`. Every rank calls it before each step, also before the first;
    the step itself exchanges the counts.

    Args:
        counts_MLE: this rank's tokens for each expert, integers [M, L, E] in a tensor, an array or
            lists. M are the step's microbatches, L this rank's MoE layers, one model chunk after
            the other. Of top-k indices [T, K] it is
            `indices.new_zeros(T, E).scatter_(1, indices, 1).sum(dim=0)`: a token that has an expert
            twice is sent once.

    Raises:
        ValueError: another plan mode; another shape or dtype, or negative counts.
    """
    if _session is None:
        return
    mode = _session.config.mode
    if mode != PlanMode.ANNOUNCED:
        raise ValueError(
            f"announce_routing: no effect with --fsep-plan-mode {mode}; give --fsep-plan-mode "
            f"{PlanMode.ANNOUNCED}, or leave the call out"
        )
    coordinator = _session.coordinator
    if coordinator is not None and isinstance(coordinator.pass_layouts, AnnouncedLayouts):
        coordinator.pass_layouts.announce(torch.as_tensor(counts_MLE), len(coordinator.layers))


def _common_seed(groups: FSEPGroups) -> int:
    seed = torch.tensor([torch.initial_seed()], dtype=torch.int64, device=current_device())
    dist.broadcast(seed, src=groups.planner_rank, group=groups.tokens)
    return int(seed.item())
