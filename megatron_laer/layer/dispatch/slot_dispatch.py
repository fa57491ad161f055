"""Common base of dispatchers over slots, in front of Megatron's own.

A dispatcher uses S slots instead of E experts. Slots are equal in number and contiguous per rank,
as stock's exchanges assume. Sizes come from the plan.

Legend: N ranks, T tokens, E experts, S slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_laer.layer.dispatch.permutation import slot_ranges
from megatron_laer.layer.dispatch.slots import to_slots
from megatron_laer.runtime.comm.copies import upload_arrays
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.ranges import exchange_in_range
from megatron_laer.telemetry.step_times import StepTimes
from megatron_laer.verify.gradients import Roundings
from megatron_laer.verify.tokens import PassTokens


@dataclass(frozen=True, eq=False)
class SlotDispatch:
    """Dispatch of one forward pass of a layer."""

    plan: MicrobatchPlan
    layer_name: str
    step_times: StepTimes | None
    verified: PassTokens | None


class SlotDispatching:
    """First base of a dispatcher over slots; the second is Megatron's, configured for S experts."""

    tp_size: int
    shared_experts: Any
    config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pass: SlotDispatch | None = None
        # Tokens by source rank and slot on the device, for kernels of stock.
        self._columns_NC: torch.Tensor | None = None
        # Results of the router and its counts. Megatron carries them out of a CUDA graph.
        self.routing_map_TE: torch.Tensor | None = None
        self.counts_E: torch.Tensor | None = None
        assert self.tp_size == 1, "experts are never cut by tensor parallelism"

    def count(self, routing_map_TE: torch.Tensor) -> None:
        """Count this rank's tokens per expert on the device, without a plan."""
        self.routing_map_TE, self.counts_E = routing_map_TE, routing_map_TE.sum(dim=0)

    def take_counted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the map and the counts of this pass, bool [T, E] and int64 [E], once."""
        routing_map_TE, self.routing_map_TE = self.routing_map_TE, None
        counts_E, self.counts_E = self.counts_E, None
        assert routing_map_TE is not None and counts_E is not None, "no counts of this pass"
        return routing_map_TE, counts_E

    def begin(self, dispatch: SlotDispatch) -> None:
        self._pass = dispatch

    def rows_sent(self, rank: int, node_size: int) -> tuple[int, int] | None:
        """Return the rows sent inside the node and to other nodes by this pass's dispatch.

        Forwarded rows count; rows to the own rank do not. None if a buffer library makes the rows.
        """
        return rows_by_node(self._current.plan.quotas.input_splits_N, rank, node_size)

    def launch_ahead(self, routing_map_TE: torch.Tensor) -> None:
        """Launch what needs no plan, during the exchange of counts."""

    def start_shared_experts(self, hidden_states: torch.Tensor) -> None:
        """Start the shared experts that overlap with exchanges; stock does so after the sizes."""
        if self.shared_experts is not None:
            # A separate node, as stock's view, preserves stock's order of adding gradients.
            self.shared_experts.pre_forward_comm(hidden_states.view_as(hidden_states))

    def end_step(self) -> None:
        """Finish a training step."""

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
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
        """Exchange tensors; where steps are timed, two identity nodes time it and what follows."""
        activity, then, then_backward = activities
        step_times = self._current.step_times
        if step_times is None:
            return exchange_in_range(activity, exchange, tensors)
        begin, end = step_times.begin_exchange, step_times.end_exchange
        sent = _Edge.apply(partial(begin, activity), partial(end, then_backward), *tensors)
        received = exchange_in_range(activity, exchange, sent)
        timed: tuple[torch.Tensor, ...] = _Edge.apply(
            partial(end, then), partial(begin, replace(activity, backward=True)), *received
        )
        return timed

    def _without_shared_experts(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run a step of Megatron's that would start the shared experts, or add their output."""
        shared_experts, self.shared_experts = self.shared_experts, None
        try:
            return step(*args)
        finally:
            self.shared_experts = shared_experts

    def _finish(self, output: torch.Tensor, hops: int) -> torch.Tensor:
        """Add the shared experts' output to tokens' sums, which were rounded in so many hops."""
        self._verify_combined(output, hops)
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output

    def _verify_sent(
        self, hidden: torch.Tensor, routing_map_TE: torch.Tensor, probs_TE: torch.Tensor
    ) -> None:
        if (verified := self._current.verified) is not None:
            verified.sent(hidden, routing_map_TE, probs_TE)

    def _verify_combined(self, output: torch.Tensor, hops: int) -> None:
        if (verified := self._current.verified) is not None:
            roundings = Roundings(output.dtype, output.dtype, hops)
            verified.combined(output, roundings, self.config.moe_router_topk)

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


def rows_by_node(sent_N: Sequence[int], rank: int, node_size: int) -> tuple[int, int]:
    first = rank - rank % node_size
    in_node = sum(sent_N[first : first + node_size])
    return in_node - sent_N[rank], sum(sent_N) - in_node


class _Edge(torch.autograd.Function):
    """Identity that calls one function in forward and another in backward."""

    @staticmethod
    def forward(
        ctx: Any, pass_: Callable[[], None], back: Callable[[], None], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        pass_()
        ctx.back = back
        ctx.set_materialize_grads(False)  # missing gradients must stay missing
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.back()
        return (None, None, *grads)
