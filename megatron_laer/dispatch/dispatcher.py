"""`SlotTokenDispatcher` is Megatron's All-to-All dispatcher over slots instead of experts.

Slots are equal in number and contiguous per rank, which is all that stock's permutations and
exchanges assume. Only the map of tokens to slots and the sizes are ours: they come from the quotas,
not from an exchange.

Legend: T tokens, E experts, S slots, C slots per rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_laer.dispatch.exchange_edges import exchange_edges
from megatron_laer.dispatch.slots import slot_ranges, to_slots
from megatron_laer.runtime.comm.upload import upload
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.telemetry.timeline import DENSE, Timeline


@dataclass(frozen=True, eq=False)
class SlotDispatch:
    """Says how one forward pass of a layer dispatches its tokens.

    Attributes:
        plan: which tokens go to which slots.
        layer_name: for the timeline.
        timeline: where the layer's token exchanges are recorded, if anywhere.
    """

    plan: MicrobatchPlan
    layer_name: str
    timeline: Timeline | None


class SlotTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Dispatches to S slots, of which C are local; its config gives S as the number of experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # On the group's own stream, whose priority the plugin raises, tokens overtake other work.
        self.use_nccl_stream = True
        self._pass: SlotDispatch | None = None

    def begin(self, dispatch: SlotDispatch) -> None:
        """Begin a forward pass of the layer; its steps follow."""
        self._pass = dispatch

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        """Map tokens to slots, then do as Megatron does with experts.

        Args:
            hidden_states: [..., H], T tokens.
            routing_map: bool [T, E], the router's; a re-run under a checkpoint has the first
                pass's in its plan instead.
            probs: [T, E].
        """
        plan = self._current.plan
        if plan.routing_map_TE is not None:
            routing_map = plan.routing_map_TE
        ranges_2S = upload(
            torch.from_numpy(slot_ranges(plan.row_S, plan.layout.slot_expert_S)), routing_map.device
        )
        probs_TS, slot_map_TS = to_slots(
            probs, routing_map, plan.restored.index.slot_expert_S, ranges_2S
        )
        return super().dispatch_preprocess(hidden_states, slot_map_TS, probs_TS)

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Take the sizes from the plan; stock's would gather counts and copy them to the host.

        Args:
            routing_map: bool [T, S].

        Returns:
            Tokens of each local slot, int64 [C] on the host.
        """
        plan = self._current.plan
        self.num_out_tokens = plan.num_sent
        self.input_splits = plan.input_splits_N
        self.output_splits = plan.output_splits_N
        self.output_splits_tp = None
        columns_NC = torch.from_numpy(plan.columns_NC)
        # The fused sort of chunks runs on the device and reads sizes there, stock's on the host.
        self.num_global_tokens_per_local_expert = (
            upload(columns_NC, routing_map.device) if self.config.moe_permute_fusion else columns_NC
        )
        return columns_NC.sum(dim=0)

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        """Megatron's, with its begin and end on the timeline."""
        timeline, layer = self._current.timeline, self._current.layer_name
        if timeline is None:
            return super().token_dispatch(tokens, probs)
        before, after = exchange_edges(
            timeline, f"dispatch {layer}", f"experts {layer}", f"{DENSE}, backward"
        )
        return after(*super().token_dispatch(*before(tokens, probs)))

    def token_combine(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, with its begin and end on the timeline."""
        timeline, layer = self._current.timeline, self._current.layer_name
        if timeline is None:
            return super().token_combine(tokens, *args, **kwargs)
        before, after = exchange_edges(
            timeline, f"combine {layer}", DENSE, f"experts {layer}, backward"
        )
        (tokens,) = before(tokens)
        (combined,) = after(super().token_combine(tokens, *args, **kwargs))
        return combined

    @property
    def _current(self) -> SlotDispatch:
        assert self._pass is not None, "a step of the dispatcher before `begin`"
        return self._pass
