"""`SlotTokenDispatcher` is Megatron's All-to-All dispatcher over slots instead of experts.

Slots are equal in number and contiguous per rank, which is all that stock's exchanges assume. Sizes
come from the quotas, not from an exchange, and so do the permutations (`permutation`). With
`--moe-permute-fusion` these are stock's fused ones, over the map of tokens to slots (`slots`).

Legend: T tokens, E experts, S slots, C slots per rank, P rows sent, R rows received, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_laer.dispatch.exchange_edges import exchange_edges
from megatron_laer.dispatch.permutation import SlotPermutation, slot_permutation, slot_ranges
from megatron_laer.dispatch.slots import to_slots
from megatron_laer.runtime.comm.upload import upload_arrays
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

    shared_experts: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # On the group's own stream, whose priority the plugin raises, tokens overtake other work.
        self.use_nccl_stream = True
        self._pass: SlotDispatch | None = None
        self._permutation: SlotPermutation | None = None
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

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        """Put tokens and probabilities into the order in which they are sent.

        Args:
            hidden_states: [..., H], T tokens.
            routing_map: bool [T, E], the router's; a re-run under a checkpoint has the first
                pass's in its plan instead.
            probs: [T, E].

        Returns:
            [P, H] and [P].
        """
        plan = self._current.plan
        if plan.routing_map_TE is not None:
            routing_map = plan.routing_map_TE
        if self.config.moe_permute_fusion:
            shared_experts, self.shared_experts = self.shared_experts, None  # they were started
            sent = super().dispatch_preprocess(hidden_states, *self._to_slots(routing_map, probs))
            self.shared_experts = shared_experts
            return sent
        self.hidden_shape = hidden_states.shape
        hidden_TH = hidden_states.view(-1, self.hidden_shape[-1])
        self.tokens_per_expert = self.preprocess(routing_map)
        self._permutation = slot_permutation(routing_map, plan.quotas)
        return self._permutation.to_send(hidden_TH, probs)

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> Any:
        """Sort what arrived by slot.

        Args:
            global_input_tokens: [R, H], by source rank.
            global_probs: [R].

        Returns:
            Both, by slot, and between them the tokens of each local slot, int64 [C].
        """
        if self._permutation is None:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        if self.num_local_experts > 1:
            global_input_tokens = self._permutation.by_slot(global_input_tokens)
            global_probs = self._permutation.by_slot(global_probs)
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> Any:
        """Sort the experts' outputs, [R, H], by the ranks that they go back to."""
        if self._permutation is None:
            return super().combine_preprocess(hidden_states)
        if self.num_local_experts == 1:
            return hidden_states
        return self._permutation.by_rank(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> Any:
        """Sum what came back, [P, H], for each token, and add the shared experts' output."""
        if self._permutation is None:
            return super().combine_postprocess(permutated_local_input_tokens)
        permutation, self._permutation = self._permutation, None
        output = permutation.combine(permutated_local_input_tokens).view(self.hidden_shape)
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Take the sizes from the plan; stock's would gather counts and copy them to the host.

        Args:
            routing_map: not looked at.

        Returns:
            Tokens of each local slot, int64 [C] on the host.
        """
        quotas = self._current.plan.quotas
        self.num_out_tokens = quotas.num_sent
        self.input_splits = quotas.input_splits_N
        self.output_splits = quotas.output_splits_N
        self.output_splits_tp = None
        # The fused sort of chunks runs on the device and reads sizes there; ours was told them.
        self.num_global_tokens_per_local_expert, self._columns_NC = self._columns_NC, None
        return torch.tensor(quotas.tokens_C)

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
        assert self._pass is not None, "a step of the dispatcher before `begin`"
        return self._pass
