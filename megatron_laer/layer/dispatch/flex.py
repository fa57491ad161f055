"""Megatron's flex dispatcher over slots, with DeepEP or HybridEP.

Metadata come from the plan instead of the router's probabilities. DeepEP receives the slots of each
token. HybridEP receives the map of tokens to slots and the number of rows that this rank will
receive. A buffer's counts are compared with the plan. DeepEP's are compared at once; HybridEP's
after their arrival from the device, or at the end of the training step.

Legend: T tokens, E experts, S slots, C slots per rank, H hidden.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching
from megatron_laer.layer.dispatch.slots import to_choices
from megatron_laer.runtime.comm.copies import upload_arrays


@dataclass(frozen=True, eq=False)
class _Received:
    """Tokens that a pass brought to each local slot, by the plan and by the buffer.

    Attributes:
        counted_C: on the host, valid after `arrived`.
        arrived: None if the host had it at once.
    """

    layer_name: str
    planned_C: list[int]
    counted_C: torch.Tensor
    arrived: torch.cuda.Event | None

    @property
    def is_there(self) -> bool:
        return self.arrived is None or self.arrived.query()


class SlotFlexDispatcher(SlotDispatching, MoEFlexTokenDispatcher):
    """Dispatcher to S slots, of which C are local; its config has S as the number of experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._backend: str = self.config.moe_flex_dispatcher_backend
        self._received: deque[_Received] = deque()

    def rows_sent(self, rank: int, node_size: int) -> None:
        """Return None: the buffers create their own rows."""

    def start_shared_experts(self, hidden_states: torch.Tensor) -> None:
        """Do nothing: Megatron's dispatcher starts them."""

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        """Set the destinations of tokens; return tokens [T, H] and the buffer's probabilities."""
        plan, manager = self._current.plan, self._comm_manager
        routing_map = self._routed(routing_map)
        self._verify_sent(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        if self._backend == "hybridep":
            manager.moe_expert_rank_capacity_factor = None
            manager.setup_metadata(*self._to_slots(routing_map, probs))
            # With a budget of rows, stock does not wait for a count, and keeps the buffer's. The
            # budget is the plan's number, not a factor's.
            manager.moe_expert_rank_capacity_factor = 1.0
            manager.num_permuted_tokens = plan.quotas.num_received
        else:
            slots = np.argsort(plan.layout.slot_expert_S, kind="stable")
            by_expert, tokens = upload_arrays([slots, plan.quotas.row_S[slots]], routing_map.device)
            manager.token_probs, manager.token_indices = to_choices(
                probs,
                routing_map,
                self.config.moe_router_topk,
                by_expert_S=by_expert,
                tokens_S=tokens,
                num_pairs=plan.quotas.num_sent,
            )
        return hidden_states.view(-1, self.hidden_shape[-1]), manager.token_probs

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        """Send tokens, [T, H], and compare the buffer's counts with the plan."""
        dispatched = super().token_dispatch(tokens, probs)
        counted_C = self._comm_manager.get_number_of_tokens_per_expert()
        current, arrived = self._current, None
        if counted_C.is_cuda:
            counted_C = counted_C.to("cpu", non_blocking=True)  # torch pins the target
            arrived = torch.cuda.Event()
            arrived.record()
        self._received.append(
            _Received(current.layer_name, current.plan.quotas.tokens_C, counted_C, arrived)
        )
        while self._received and self._received[0].is_there:
            self._compare(self._received.popleft())
        return dispatched

    def combine_postprocess(self, hidden_states: torch.Tensor) -> Any:
        """Return the output, of hidden_states' shape.

        Megatron adds shared experts' output in place, which autograd allows no node that is timed.
        """
        self._verify_combined(hidden_states, self.config.moe_router_topk)
        if self.shared_experts is not None and self._current.step_times is not None:
            hidden_states = hidden_states.clone()
        return super().combine_postprocess(hidden_states)

    def end_step(self) -> None:
        while self._received:
            received = self._received.popleft()
            if received.arrived is not None:
                received.arrived.synchronize()
            self._compare(received)

    def _compare(self, received: _Received) -> None:
        counted_C = received.counted_C.tolist()
        if counted_C != received.planned_C:
            raise RuntimeError(
                f"{received.layer_name}: {self._backend} brought {counted_C} tokens to the slots "
                f"of rank {self.ep_rank}, and the plan says {received.planned_C}, so experts would "
                "compute with tokens of others; give --moe-token-dispatcher-type alltoall, and "
                "report it with the version of deep_ep"
            )
