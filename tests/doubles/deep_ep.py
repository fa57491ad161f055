"""All-to-All replacements of DeepEP's and HybridEP's buffers for Megatron's flex dispatcher.

A token is sent once to each rank that has one of its experts. Ranks receive tokens by source rank,
in token order.

Legend: T tokens of this rank, Q tokens sent, N ranks, E experts, C experts per rank, K top-k. R
tokens received, H hidden, P pairs of a received token and an expert here.
"""

import importlib
import sys
import types
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import fused_a2a, token_dispatcher

# Names that the dispatcher has imported.
_OF_DISPATCHER = (
    *("fused_combine", "fused_dispatch", "set_deepep_num_sms"),
    *("hybrid_ep_combine", "hybrid_ep_dispatch"),
)


def give_to_megatron() -> None:
    """Provide these buffers to Megatron's flex dispatcher, and to no other importer."""
    package, utils = types.ModuleType("deep_ep"), types.ModuleType("deep_ep.utils")
    vars(package).update(Buffer=Buffer, HybridEPBuffer=HybridEPBuffer)
    vars(utils).update(EventHandle=EventHandle, EventOverlap=EventOverlap)
    modules = {"deep_ep": package, "deep_ep.utils": utils}
    with mock.patch.dict(sys.modules, modules):
        importlib.reload(fused_a2a)
    for name in _OF_DISPATCHER:
        setattr(token_dispatcher, name, getattr(fused_a2a, name))


class EventHandle:
    """Replacement of a CUDA event; work is done when a call returns."""


class EventOverlap:
    """Replacement of DeepEP's event holder."""

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        pass


# Of DeepEP's buffers, in bytes: this one needs none.
_CONFIG = types.SimpleNamespace(
    get_nvl_buffer_size_hint=lambda hidden_bytes, num_ranks: 0,
    get_rdma_buffer_size_hint=lambda hidden_bytes, num_ranks: 0,
)


@dataclass(frozen=True, eq=False)
class _Route:
    """Tokens that this rank sends and receives; each is sent once per destination rank."""

    group: dist.ProcessGroup
    num_tokens: int
    token_Q: torch.Tensor
    sent_N: list[int]
    received_N: list[int]

    @classmethod
    def of(cls, group: dist.ProcessGroup, goes_TN: torch.Tensor) -> "_Route":
        sent_N = goes_TN.sum(dim=0)
        received_N = torch.empty_like(sent_N)
        dist.all_to_all_single(received_N, sent_N, group=group)
        token_Q = goes_TN.t().nonzero()[:, 1]
        return cls(group, len(goes_TN), token_Q, sent_N.tolist(), received_N.tolist())

    def there(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Send rows of tokens, [T, …], and return the received rows, [R, …]."""
        return self._exchange(rows_T[self.token_Q], self.sent_N, self.received_N)

    def sum_back(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Send rows of received tokens back and add up each token's rows, in fp32 or wider."""
        rows_Q = self._exchange(rows_R, self.received_N, self.sent_N)
        wide = torch.promote_types(rows_Q.dtype, torch.float32)
        total_T = rows_Q.new_zeros(self.num_tokens, *rows_Q.shape[1:], dtype=wide)
        return total_T.index_add_(0, self.token_Q, rows_Q.to(wide)).to(rows_Q.dtype)

    def _exchange(
        self, rows: torch.Tensor, sizes: list[int], sizes_there: list[int]
    ) -> torch.Tensor:
        arrived = rows.new_empty(sum(sizes_there), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), sizes_there, sizes, group=self.group)
        return arrived


class Buffer:
    """Replacement of DeepEP's buffer."""

    num_sms = 20

    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, **_: Any
    ) -> None:
        self.group = group
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> types.SimpleNamespace:
        return _CONFIG

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, **_: Any
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count this rank's tokens for each rank and expert; -1 in `topk_idx` is no expert."""
        assert topk_idx.dtype == torch.int64
        ranks = self.group.size()
        chosen_TE1 = topk_idx.new_zeros((len(topk_idx), num_experts + 1), dtype=torch.bool)
        chosen_TE1.scatter_(1, topk_idx % (num_experts + 1), True)
        chosen_TE = chosen_TE1[:, :-1]
        goes_TN = chosen_TE.reshape(len(topk_idx), ranks, num_experts // ranks).any(dim=2)
        tokens_N = goes_TN.sum(dim=0, dtype=torch.int32)
        tokens_E = chosen_TE.sum(dim=0, dtype=torch.int32)
        return tokens_N, None, tokens_E, goes_TN, EventOverlap()

    def dispatch(
        self,
        x: torch.Tensor,
        handle: tuple[_Route] | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        """Send tokens, [T, H]; with a handle, along its route and without expert indices."""
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            (route,) = handle
            return route.there(x), None, None, None, None, EventOverlap()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        assert topk_weights.dtype == torch.float32
        route = _Route.of(self.group, is_token_in_rank)
        per_rank = len(num_tokens_per_expert) // self.group.size()
        index_RK = route.there(topk_idx) - per_rank * self.group.rank()
        is_here_RK = (index_RK >= 0) & (index_RK < per_rank)
        counts_C = torch.bincount(index_RK[is_here_RK], minlength=per_rank)
        weights_RK = route.there(topk_weights)
        return (
            route.there(x),
            index_RK.masked_fill(~is_here_RK, -1),
            weights_RK.masked_fill(~is_here_RK, 0),
            counts_C.tolist(),
            (route,),
            EventOverlap(),
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[_Route],
        topk_weights: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Send rows of received tokens back, [R, H], and add up each token's rows and weights."""
        (route,) = handle
        weights_TK = None if topk_weights is None else route.sum_back(topk_weights)
        return route.sum_back(x), weights_TK, EventOverlap()


class HybridEPBuffer:
    """Replacement of HybridEP's buffer, which also sorts received tokens by expert."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        **_: Any,
    ) -> None:
        self.group = group
        self.num_local_experts = num_local_experts

    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        routing_map: torch.Tensor | None = None,
        probs: torch.Tensor | None = None,
        scaling_factor: None = None,
        num_of_experts_per_rank: int | None = None,
        num_permuted_tokens: int | None = None,
        pad_multiple: None = None,
        handle: tuple[Any, ...] | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Any, ...]:
        """Send tokens, [T, H], and sort the received ones by expert.

        Return rows [P, H], probabilities [P], None, tokens by expert, and a handle. Its last part
        is 1 if there were more rows than `num_permuted_tokens`.
        """
        assert pad_multiple is None, "rows are not filled up here"
        if non_blocking:
            assert num_permuted_tokens is not None
        if handle is None:
            assert routing_map is not None and routing_map.dtype == torch.bool
            assert num_of_experts_per_rank in (None, self.num_local_experts)
            handle = self._handle(routing_map, num_permuted_tokens)
        route, source_P, expert_P, tokens_C, _ = handle
        size = len(source_P) if num_permuted_tokens is None else num_permuted_tokens
        hidden_PH, probs_P = _rows(route.there(hidden)[source_P], size), None
        if probs is not None:
            assert probs.dtype == torch.float32
            probs_P = _rows(route.there(probs)[source_P, expert_P], size)
        return hidden_PH, probs_P, None, tokens_C, handle

    def combine_with_unpermute(
        self,
        *,
        hidden: torch.Tensor,
        probs: torch.Tensor | None = None,
        handle: tuple[Any, ...],
        pad_multiple: None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add up the rows of each received token, [P, H], send the sums back, and add these up."""
        route, source_P, expert_P, _, _ = handle
        received, rows = sum(route.received_N), len(source_P)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums_RH = hidden.new_zeros((received, hidden.shape[1]), dtype=wide)
        sums_RH.index_add_(0, source_P, hidden[:rows].to(wide))
        probs_TE = None
        if probs is not None:
            experts = self.group.size() * self.num_local_experts
            probs_RE = probs.new_zeros((received, experts), dtype=torch.float32)
            probs_RE[source_P, expert_P] = probs[:rows].float()
            probs_TE = route.sum_back(probs_RE)
        return route.sum_back(sums_RH.to(hidden.dtype)), probs_TE

    def _handle(self, routing_map_TE: torch.Tensor, most: int | None) -> tuple[Any, ...]:
        device = routing_map_TE.device
        numbers_N = torch.empty(self.group.size(), dtype=torch.int64, device=device)
        number = torch.tensor([len(routing_map_TE)], device=device)
        dist.all_gather_into_tensor(numbers_N, number, group=self.group)
        if len(numbers_N.unique()) > 1:
            raise ValueError(f"HybridEP needs as many tokens on each rank, not {numbers_N}")
        shape = len(routing_map_TE), self.group.size(), self.num_local_experts
        route = _Route.of(self.group, routing_map_TE.reshape(shape).any(dim=2))
        first = self.group.rank() * self.num_local_experts
        map_RE = route.there(routing_map_TE.byte())
        map_RC = map_RE[:, first : first + self.num_local_experts]
        expert_P, source_P = map_RC.t().nonzero().unbind(dim=1)
        overflows = most is not None and len(source_P) > most
        overflow = torch.tensor([overflows], dtype=torch.int32, device=device)
        return route, source_P[:most], first + expert_P[:most], map_RC.sum(dim=0), overflow


def _rows(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Pad to `size` rows with NaN, so that reading an unwritten row shows."""
    padding = rows.new_full((max(size - len(rows), 0), *rows.shape[1:]), float("nan"))
    return torch.cat([rows, padding])[:size]
