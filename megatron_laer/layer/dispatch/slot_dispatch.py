"""`SlotDispatching` is what dispatchers over slots have in common, in front of Megatron's own.

A dispatcher sees S slots instead of E experts. Slots are equal in number and contiguous per rank,
which is all that stock's exchanges assume. Sizes come from the plan.

Legend: T tokens, E experts, S slots, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_laer.layer.dispatch.exchange_edges import exchange_edges
from megatron_laer.layer.dispatch.permutation import slot_ranges
from megatron_laer.layer.dispatch.slots import to_slots
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.telemetry.step_times import IntervalListener
from megatron_laer.telemetry.trace_events import Activity, Kind


@dataclass(frozen=True, eq=False)
class SlotDispatch:
    """Says how one forward pass of a layer dispatches its tokens.

    Attributes:
        plan: which tokens go to which slots.
        layer_name: for the listener.
        listener: hears of the layer's token exchanges, if anybody does.
    """

    plan: MicrobatchPlan
    layer_name: str
    listener: IntervalListener | None


class SlotDispatching:
    """Is the first base of a dispatcher over slots; the second one is Megatron's.

    Megatron's gets a config that gives S as the number of experts.
    """

    tp_size: int
    shared_experts: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pass: SlotDispatch | None = None
        # Tokens by source rank and slot on the device, for kernels of stock's that read them there.
        self._columns_NC: torch.Tensor | None = None
        assert self.tp_size == 1, "experts are never cut by tensor parallelism"

    def begin(self, dispatch: SlotDispatch) -> None:
        """Begin a forward pass of the layer; its steps follow."""
        self._pass = dispatch

    def start_shared_experts(self, hidden_states: torch.Tensor) -> None:
        """Start the shared experts that overlap with exchanges; stock does so after the sizes."""
        if self.shared_experts is not None:
            # A node of its own, as stock's view: gradients are then added in stock's order.
            self.shared_experts.pre_forward_comm(hidden_states.view_as(hidden_states))

    def end_step(self) -> None:
        """Do what is left to do when a training step is over."""

    def keeping_rows(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context for the experts, in which autograd keeps less of their input."""
        return contextlib.nullcontext()

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        """Megatron's, with its begin and end told to the listener."""
        megatrons: Any = super()
        layer = self._current.layer_name
        return self._timed(
            megatrons.token_dispatch,
            (tokens, probs),
            (
                Activity(Kind.DISPATCH, layer),
                Activity(Kind.EXPERTS, layer),
                Activity(Kind.DENSE, backward=True),
            ),
        )

    def token_combine(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, with its begin and end told to the listener."""
        megatrons: Any = super()
        layer = self._current.layer_name
        (combined,) = self._timed(
            lambda tokens: (megatrons.token_combine(tokens, *args, **kwargs),),
            (tokens,),
            (
                Activity(Kind.COMBINE, layer),
                Activity(Kind.DENSE),
                Activity(Kind.EXPERTS, layer, backward=True),
            ),
        )
        return combined

    def _timed(
        self,
        exchange: Callable[..., tuple[torch.Tensor, ...]],
        tensors: tuple[torch.Tensor, ...],
        activities: tuple[Activity, Activity, Activity],
    ) -> tuple[torch.Tensor, ...]:
        """Exchange tensors with begin and end told to the listener, if there is one.

        Args:
            activities: the exchange, and the phases that follow it: see `exchange_edges`.
        """
        if self._current.listener is None:
            return exchange(*tensors)
        before, after = exchange_edges(self._current.listener, *activities)
        return after(*exchange(*before(*tensors)))

    def _routed(self, routing_map_TE: torch.Tensor) -> torch.Tensor:
        """Return the router's map; in a re-run under a checkpoint the first pass's."""
        planned_TE = self._current.plan.routing_map_TE
        return routing_map_TE if planned_TE is None else planned_TE

    def _to_slots(
        self, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self._current.plan
        columns_NC = plan.quotas.columns_NC
        ranges_2S = slot_ranges(plan.quotas).astype(np.int64)
        ranges, columns = upload_arrays([ranges_2S.ravel(), columns_NC.ravel()], routing_map.device)
        self._columns_NC = columns.view(columns_NC.shape)
        probs_TS, slot_map_TS = to_slots(
            probs, routing_map, plan.restored.index.slot_expert_S, ranges.view(ranges_2S.shape)
        )
        return slot_map_TS, probs_TS

    @property
    def _current(self) -> SlotDispatch:
        if self._pass is None:
            raise ValueError(
                "the dispatcher of an FSEP layer sends tokens where the layer's plan says: call "
                "the MoE layer, not its dispatcher alone"
            )
        return self._pass
