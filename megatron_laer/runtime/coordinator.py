"""Coordinator of one rank's MoE layers, steps and checkpoints.

`build` constructs it. It extends `MicrobatchPlanner`, which plans the passes within a step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_laer.config import FSEPConfig
from megatron_laer.life import Kind, Kinds
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.runtime.comm import agreement
from megatron_laer.runtime.comm.connections import connect
from megatron_laer.runtime.comm.exchange import wire_dtype
from megatron_laer.runtime.layer_state import (
    LayerState,
    adapters_in,
    check_no_plan_is_left,
    frozen_in,
    kept_problem,
    name_of_layer,
    what_changed,
)
from megatron_laer.runtime.metrics_recorder import metrics_writer
from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner
from megatron_laer.runtime.planning.planner_rank import run_of_group
from megatron_laer.runtime.verifier import Verifier
from megatron_laer.runtime.weights.exchange_launches import launch_exchange_kernels

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Coordinator(MicrobatchPlanner):
    """Coordinator of one rank of an FSEP group; the planner shares the guard's cost model.

    `priced` are the top-k and the tokens per rank that recordings name.
    """

    config: FSEPConfig
    kinds: Kinds
    guard: Guard
    verifier: Verifier
    priced: Mapping[str, int]
    seed: int
    layers: list[LayerState] = field(default_factory=list)
    _unreported_steps: int = 0
    _unreported_bytes: int = 0
    _received_before: int = 0

    @property
    def geometry(self) -> Geometry:
        return self.guard.geometry

    def register_layer(self, number: int, is_mtp: bool, **described: Any) -> LayerState:
        """Add a MoE layer, in the same order on all ranks, with these fields of `LayerState`."""
        assert not self.in_steps, "a layer was built after training began"
        name = name_of_layer(number, is_mtp, [layer.name for layer in self.layers])
        home = self.layouts.add_layer(name, quantised=described.get("quantised", True))
        state = LayerState(
            index=len(self.layers),
            name=name,
            number=number,
            is_mtp=is_mtp,
            home=home,
            geometry=self.geometry,
            streams=self.streams,
            device=self.device,
            kinds=self.kinds,
            **described,
        )
        self.layers.append(state)
        return state

    def problem_of_model(self) -> str | None:
        """Describe homes that a layer lacks, and changed experts; None without a problem."""
        for layer in self.layers:
            layer.find_share()  # with its adapters
        return self.layouts.homes_problem or what_changed(self.layers)

    def start(self, first_step: int) -> str | None:
        """Compare the ranks' settings, and open planner and recordings. Collective.

        Returns:
            A problem, for the caller to raise on every rank of the world.
        """
        self.in_steps = True
        summary = agreement.summarise(self.config, self.geometry, self.guard.costs, self.seed)
        summary["frozen experts"] = frozen_in(self.layers)
        summary["adapters of experts"] = adapters_in(self.layers)
        problem = (
            agreement.difference(summary, self.groups)
            or self.problem_of_model()
            or kept_problem(self.layers, self.config.kept_gib)
        )
        if problem is not None:
            return problem
        try:
            names = [layer.name for layer in self.layers]
            unquantised = self.layouts.unquantised
            group = self.groups.index
            run = None
            if self.groups.rank == 0:
                state = self.layouts.resumption.state
                run = run_of_group(self.config, group, first_step, state.run if state else None)
            if run is not None and names and self.config.record_metrics is not None:
                of_run = self.config, self.guard, self.priced, self.device, group
                writer = metrics_writer(*of_run, names, first_step, run)
                self.recorder.open(writer, names, unquantised)
                for stream in (self.streams.parameters, self.streams.gradients):
                    stream.times.step_times = self.recorder.times
            self._launch_kernels()
            self.verifier.start()
            self.layouts.start(first_step, run)
        except (ValueError, OSError) as error:
            return str(error)
        except Exception as error:  # reported to the other ranks
            logger.exception("FSEP: planner and recordings could not be opened")
            return f"{type(error).__name__}: {error}"
        return None

    def connect(self) -> None:
        """Connect the ranks on all communicators that steps use. Collective over the group."""
        through_nodes = self.groups.tokens_intra_node, self.groups.tokens_inter_node
        used = through_nodes if self.token_sizes is not None else ()
        tokens = [group for group in used if group is not None]
        connect([*self.streams.exchange.communicators, *tokens], self.device)

    def _launch_kernels(self) -> None:
        """Launch all Triton kernels on a card, each of which is compiled by that."""
        for layer in self.layers:
            layer.launch_kernels()
            launch_exchange_kernels(
                layer.share,
                holds_step=Kind.STEP in self.kinds,
                wire_dtype=wire_dtype(self.config),
            )

    def begin_step(
        self, step: int, num_microbatches: int | None = None, *, all_at_stock: bool = False
    ) -> None:
        """Begin a step: layouts that are due take effect. Collective over the group.

        Args:
            step: of the run, so that a resumed run continues the same numbers.
            num_microbatches: of this step; lets planning start while the last backward passes run.
            all_at_stock: whether all layers have stock's placement in this step.
        """
        assert self.in_steps, "begin_step before start"
        check_no_plan_is_left(self.layers)
        self._put_pairs()
        self.recorder.begin_step(step)
        names = [layer.name for layer in self.layers]
        self.verifier.begin_step(step, names)
        at_stock = frozenset(
            at for at, name in enumerate(names) if all_at_stock or self.verifier.has_found(name)
        )
        self._received_before = self.streams.exchange.received_bytes
        self.layouts.begin_step(step, num_microbatches, at_stock)
        expected = self.pass_layouts.begin_step(
            step, num_microbatches, len(self.layers), replays=self.scheduler.replays_routing
        )
        self.scheduler.begin_step(expected)
        for layer in self.layers:
            layer.begin_step(expected)
        self.pairs.begin_step(step, len(self.layers))
        known = self.pass_layouts.known([layer.next_pass(training=True) for layer in self.layers])
        for at, layout in known.items():
            self.layers[at].tag(self.layouts.version, layout)  # upload it now
            self.layers[at].begin_layout(layout, num_microbatches)

    def end_step(self) -> None:
        self.verifier.end_step()
        check_no_plan_is_left(self.layers)
        self.scheduler.end_step()
        self.pairs.end_step()
        for layer in self.layers:
            layer.end_step()
        self.layouts.end_step()
        self._unreported_steps += 1
        received_bytes = self.streams.exchange.received_bytes - self._received_before
        self._unreported_bytes += received_bytes
        of_layouts = self.layouts.status, self.layouts.version
        self.recorder.end_step(*of_layouts, received_bytes, self.verifier.checks)

    def take_exchanged(self) -> tuple[float, float, float]:
        """Return this rank's means of the steps since the last call.

        These are waits for restores and for gradients in ms, and the bytes received by both.
        """
        steps, self._unreported_steps = max(1, self._unreported_steps), 0
        received_bytes, self._unreported_bytes = self._unreported_bytes, 0
        restores, reduces = self.streams.parameters.times, self.streams.gradients.times
        waits_ms = restores.exposed.take_ms(), reduces.exposed.take_ms()
        return waits_ms[0] / steps, waits_ms[1] / steps, received_bytes / steps

    def _put_pairs(self) -> None:
        """Record the pairs of the last step, before anything of the next one."""
        found = self.pairs.take()
        if found is not None and self.layouts.planner_rank is not None:
            self.layouts.planner_rank.put_pairs(*found)

    def close(self) -> None:
        self._put_pairs()
        self.verifier.close()
        self.scheduler.close()
        self.recorder.close()
        self.pass_layouts.close()
        self.layouts.close()
