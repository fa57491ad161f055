"""Layouts of a rank's layers, which change at step boundaries only.

All ranks of the group have the same ones: the planner rank broadcasts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megatron_laer.choices import FixedPlanner
from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import quoted
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.homes_file import ModelHomes
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.state import PlannerState
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.runtime.comm.collectives import broadcast_layouts
from megatron_laer.runtime.comm.copies import Download
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.planning import planner_checkpoint
from megatron_laer.runtime.planning.planner_checkpoint import Resumption
from megatron_laer.runtime.planning.planner_rank import PlannerRank


@dataclass(eq=False)
class LayoutsInForce:
    """Layout of each MoE layer of this rank, by the layer's index; experts are home positions.

    `homes` has the order of `given_homes`, or else stock's, of each layer. Of layers `unquantised`
    prices are those in bf16. Layers `at_stock` have stock's placement, whatever is planned, in
    training and evaluation. `planner_rank` is on that rank alone, once started. `run` is the run's
    number, in the states that it saves.
    """

    config: FSEPConfig
    groups: FSEPGroups
    geometry: Geometry
    costs: CostModel
    seed: int
    device: torch.device
    given_homes: ModelHomes | None = None
    version: int = 0
    status: PlannerStatus = field(default_factory=PlannerStatus)
    resumption: Resumption = field(default_factory=Resumption)
    homes: list[HomeOrder] = field(default_factory=list)
    homes_problem: str | None = None
    unquantised: set[int] = field(default_factory=set)
    at_stock: frozenset[int] = frozenset()
    planner_rank: PlannerRank | None = None
    run: str | None = None
    _layers: list[str] = field(default_factory=list)
    _layouts: list[ExpertLayout] = field(default_factory=list)
    _step: int = 0

    def __post_init__(self) -> None:
        self._download = Download(self.device)

    @property
    def layouts(self) -> tuple[ExpertLayout, ...]:
        return tuple(
            self.geometry.static_layout if layer in self.at_stock else layout
            for layer, layout in enumerate(self._layouts)
        )

    def guard_of(self, layer: int, guard: Guard) -> Guard:
        guard = guard.in_bf16 if layer in self.unquantised else guard
        return guard.keeping if layer in self.at_stock else guard

    def add_layer(self, name: str, *, quantised: bool = True) -> HomeOrder:
        """Add a layer and return its homes; a missing one is a problem of `Coordinator.start`."""
        home = HomeOrder.stock(self.geometry.num_experts)
        if self.given_homes is not None:
            home = self.given_homes.by_layer.get(name, home)
            missing = self.given_homes.missing([name])
            if self.homes_problem is None and missing is not None:
                self.homes_problem = f"--fsep-homes {quoted(self.config.homes)}: {missing}"
        if not quantised:
            self.unquantised.add(len(self._layers))
        self.homes.append(home)
        self._layers.append(name)
        self._layouts.append(self.geometry.static_layout)
        return home

    def of_pass(self, layer: int, draw: int, *, training: bool) -> ExpertLayout:
        if layer in self.at_stock:
            return self.geometry.static_layout
        if self.config.planner == FixedPlanner.RANDOM and training:
            seed = (self.seed, self._step, layer, draw)
            return self.geometry.random_layout(seed)
        return self._layouts[layer]

    def start(self, first_step: int, run: str | None = None) -> None:
        """Open planner and recordings, which have the run's number, on the planner rank."""
        self.run = run
        self._go_on(first_step)
        if self.groups.rank == 0 and self._layers:
            self.planner_rank = PlannerRank(
                self.config,
                self.geometry,
                self.costs,
                self._layers,
                self._layouts,
                self.homes,
                group_index=self.groups.index,
                first_step=first_step,
                resumed=self.resumption.state,
                unquantised=self.unquantised,
                run=run,
            )

    def begin_step(
        self, step: int, num_microbatches: int | None, at_stock: frozenset[int] = frozenset()
    ) -> None:
        """Apply layouts that are due. Collective over the group.

        Without `num_microbatches`, planning starts at the end of the step.
        """
        self._step = step
        switched, self.at_stock = at_stock != self.at_stock, at_stock
        if self.planner_rank is not None:
            self.planner_rank.begin_step(step, num_microbatches)
        if self.config.makes_plans and self._layers:
            self._change(step, switched)

    def end_step(self) -> None:
        if self.planner_rank is not None:
            self.planner_rank.end_step()

    def save(self, directory: str, storage: Any) -> None:
        planner_checkpoint.save_state(directory, self.groups, self._planner_state, storage)

    def resume(self, directory: str, storage: Any, run: str | None) -> None:
        """Resume the planner's state in a run's checkpoint, if the next step follows. Collective.

        Otherwise planning starts from the static layout, and the session logs the reason.
        """
        self.resumption = planner_checkpoint.load_state(
            directory,
            self.groups,
            self.device,
            partial(self._by_position, run=run),
            storage,
        )

    def close(self) -> None:
        if self.planner_rank is not None:
            self.planner_rank.close()

    def _by_position(self, state: PlannerState, run: str | None) -> PlannerState:
        """Return a saved state with home positions; raise ValueError for another run's."""
        if state.shape == self.geometry.shape and len(state.layers) == len(self.homes):
            state = planner_checkpoint.by_position(state, self.homes)
        state.check_fits(self.geometry, self._layers, run)
        return state

    def _change(self, step: int, switched: bool) -> None:
        planner_rank = self.planner_rank
        due = None if planner_rank is None else planner_rank.due(step)
        layouts, self.status = broadcast_layouts(
            due,
            PlannerStatus() if planner_rank is None else planner_rank.status,
            self.geometry.shape,
            len(self._layers),
            self.groups,
            self._download,
        )
        if layouts is None and not switched:
            return
        self.version += 1
        if layouts is not None:
            self._layouts = list(layouts)
        if planner_rank is not None:
            planner_rank.applied(step, self.layouts)

    def _go_on(self, first_step: int) -> None:
        state = self.resumption.state
        if state is None:
            return
        if state.next_step != first_step:
            self.resumption = Resumption(
                problem=f"its state was saved before step {state.next_step} and training begins at "
                f"step {first_step}"
            )
            return
        self.version = state.version
        self._layouts = list(state.layouts)

    def _planner_state(self) -> PlannerState | None:
        """Return the planner's state between two steps after pending plans; None on other ranks."""
        planned = None if self.planner_rank is None else self.planner_rank.planned()
        if planned is None:
            state = self.resumption.state  # loaded, and saved again before the first step
            return None if state is None else planner_checkpoint.by_expert(state, self.homes)
        state = PlannerState(
            next_step=self._step + 1,
            version=self.version,
            layers=tuple(self._layers),
            layouts=tuple(self._layouts),
            forecasts=planned.forecasts,
            plans=planned.plans,
            run=self.run,
        )
        return planner_checkpoint.by_expert(state, self.homes)
