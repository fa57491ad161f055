"""Megatron's All-to-All dispatcher over slots instead of experts.

Slots are equal in number and contiguous per rank, which is all that stock's permutations and
exchanges assume. Only the sizes are ours: they come from the quotas, not from an exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_laer.dispatch.exchange_edges import exchange_edges
from megatron_laer.runtime.comm.upload import upload
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan
from megatron_laer.telemetry.timeline import DENSE, Timeline


class SlotTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Built for S slots of which C are local (through the config it is given)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # On the group's own stream, whose priority the plugin raises, tokens overtake other work.
        self.use_nccl_stream = True
        self._plan: MicrobatchPlan | None = None
        self._timeline: Timeline | None = None
        self._layer_name = ""

    def set_timeline(self, timeline: Timeline | None, layer_name: str) -> None:
        """Where to record this layer's exchanges, if anywhere."""
        self._timeline, self._layer_name = timeline, layer_name

    def set_plan(self, plan: MicrobatchPlan) -> None:
        """Sizes for the next `dispatch_preprocess`."""
        self._plan = plan

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Take the sizes from the plan; stock's would gather counts and copy them to the host.

        Args:
            routing_map: bool [T, S].

        Returns:
            Tokens of each local slot, int64 [C] on the host.
        """
        plan = self._plan
        assert plan is not None, "the dispatcher has no plan for this microbatch"
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
        if self._timeline is None:
            return super().token_dispatch(tokens, probs)
        name = f"dispatch {self._layer_name}"
        before, after = exchange_edges(
            self._timeline, name, f"experts {self._layer_name}", f"{DENSE}, backward"
        )
        return after(*super().token_dispatch(*before(tokens, probs)))

    def token_combine(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, with its begin and end on the timeline."""
        if self._timeline is None:
            return super().token_combine(tokens, *args, **kwargs)
        name = f"combine {self._layer_name}"
        before, after = exchange_edges(
            self._timeline, name, DENSE, f"experts {self._layer_name}, backward"
        )
        (tokens,) = before(tokens)
        (combined,) = after(super().token_combine(tokens, *args, **kwargs))
        return combined
