"""Megatron's All-to-All dispatcher over slots instead of experts.

Slots are equal in number and contiguous per rank, as stock's exchanges assume. Sizes and
permutations come from the quotas, not from an exchange (`permutation`). With `--moe-permute-fusion`
stock's fused ones run over the map of tokens to slots (`slots`).

Legend: T tokens, E experts, S slots, C slots per rank, P rows sent, R rows received, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_laer.layer.dispatch.permutation import SlotPermutation, slot_permutation
from megatron_laer.layer.dispatch.row_map import dispatch_kernels
from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching
from megatron_laer.runtime.comm.copies import Upload
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan


class SlotTokenDispatcher(SlotDispatching, MoEAlltoAllTokenDispatcher):
    """Dispatcher to S slots, of which C are local; its config has S as the number of experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The group's own high-priority stream lets tokens overtake other work.
        self.use_nccl_stream = True
        self._permutation: SlotPermutation | None = None
        self._ends_T: torch.Tensor | None = None
        self._upload = Upload()

    def launch_ahead(self, routing_map_TE: torch.Tensor) -> None:
        kernels = dispatch_kernels(routing_map_TE)
        if kernels is not None and not self.config.moe_permute_fusion:
            self._ends_T = kernels.token_ends(routing_map_TE)

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        """Sort tokens [..., H] and probabilities [T, E] for sending, to [P, H] and [P]."""
        plan = self._current.plan
        routing_map = self._routed(routing_map)
        self._verify_sent(hidden_states, routing_map, probs)
        if self.config.moe_permute_fusion:
            to_slots = self._to_slots(routing_map, probs)
            return self._without_shared_experts(  # already started
                super().dispatch_preprocess, hidden_states, *to_slots
            )
        self.hidden_shape = hidden_states.shape
        hidden_TH = hidden_states.view(-1, self.hidden_shape[-1])
        ends_T, self._ends_T = self._ends_T, None
        if plan.routing_map_TE is not None:  # not the map that was launched for
            ends_T = None
        runs = self._runs(plan, routing_map.device)
        self._permutation = slot_permutation(routing_map, plan.quotas, runs, ends_T)
        sent = self._permutation.to_send(hidden_TH, probs)
        self.tokens_per_expert = self.preprocess(routing_map)
        return sent

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> Any:
        """Sort tokens [R, H] and probabilities [R] by slot; count tokens per slot, int64 [C]."""
        if self._permutation is None:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        if self.num_local_experts > 1:
            global_input_tokens = self._permutation.by_slot(global_input_tokens)
            global_probs = self._permutation.by_slot(global_probs)
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> Any:
        if self._permutation is None:
            return super().combine_preprocess(hidden_states)
        if self.num_local_experts == 1:
            return hidden_states
        return self._permutation.by_rank(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> Any:
        if self._permutation is None:
            fused = super().combine_postprocess
            output = self._without_shared_experts(fused, permutated_local_input_tokens)
            return self._finish(output, self.config.moe_router_topk)
        permutation, self._permutation = self._permutation, None
        output = permutation.combine(permutated_local_input_tokens).view(self.hidden_shape)
        return self._finish(output, 1)

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Set sizes from the plan, without stock's exchange; return tokens per slot, int64 [C]."""
        quotas = self._current.plan.quotas
        self.num_out_tokens = quotas.num_sent
        self.input_splits = quotas.input_splits_N
        self.output_splits = quotas.output_splits_N
        self.output_splits_tp = None
        # The fused sort of chunks reads sizes on the device.
        self.num_global_tokens_per_local_expert, self._columns_NC = self._columns_NC, None
        return torch.tensor(quotas.tokens_C)

    def _runs(self, plan: MicrobatchPlan, device: torch.device) -> torch.Tensor:
        """Upload the plan's runs behind its gate, once; a re-run, without a gate, uses them."""
        if plan.first_pass.runs is None:
            plan.first_pass.runs = self._upload.start(torch.from_numpy(plan.quotas.runs), device)
        return plan.first_pass.runs
