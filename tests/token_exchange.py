"""Whole token exchanges on gloo ranks, by Megatron's rows or through nodes, and their sent rows.

Legend: N ranks, C slots per rank, G ranks per node, T tokens, E experts, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.token_traffic import TokenRouting
from megatron_laer.arrays import Int64
from megatron_laer.choices import Split
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.splits import RankQuotas, solve_quotas
from megatron_laer.planner.token_rows import SizeMessages, TokenRows
from megatron_laer.runtime.comm import process_groups
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.runtime.microbatch_plan import MicrobatchPlan

HIDDEN = 48
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Shape of the exchange; `tokens` are per rank, and may be zero."""

    tokens: tuple[int, ...]
    node_size: int
    capacity: int = 3
    experts: int = 8
    top_k: int = 4
    seed: int = 0
    # Each token goes to the first of the experts only; other slots and ranks stay empty.
    crowded: bool = False

    @property
    def ranks(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Sent:
    """Received rows of one collective on this rank, by sender, and bytes of a row."""

    received_N: tuple[int, ...]
    row_bytes: int
    is_hidden: bool


@dataclass
class Outcome:
    """Tensors and rows of a whole exchange, calls of shared experts, and exchanges that are timed.

    `experts` has their inputs and weights, and `grads` those of hidden states and probabilities.
    """

    experts: list[torch.Tensor]
    combined: torch.Tensor
    grads: list[torch.Tensor]
    sent: dict[str, list[Sent]]
    kept_bytes: int
    calls: list[str]
    timed: list[tuple[str, str]]


def shared_experts() -> Any:
    """Return experts that double what they are given, and remember their calls."""
    shared = mock.Mock(use_shared_expert_gate=False)
    shared.get_output.side_effect = lambda: shared.pre_forward_comm.call_args.args[0] * 2
    return shared


@contextlib.contextmanager
def gloo_groups(node_size: int) -> Iterator[FSEPGroups]:
    """Yield groups of all ranks, for exchanges through nodes of this size."""
    dist.init_process_group("gloo")
    try:
        groups = process_groups.create_groups(
            dist.group.WORLD, node_size, dist.new_group, tokens_through_nodes=True
        )
        yield groups
    finally:
        dist.destroy_process_group()


def known_rows(to_ranks_NN: Int64, to_nodes_NM: Int64, node_size: int) -> list[TokenRows]:
    num_ranks = len(to_ranks_NN)
    sizes_NZ = np.hstack([to_ranks_NN, to_nodes_NM])
    found = []
    for rank in range(num_ranks):
        messages = SizeMessages(rank, num_ranks, node_size)
        told = [
            sizes_Z[places] for sizes_Z, places in zip(sizes_NZ, messages.received, strict=True)
        ]
        found.append(messages.rows(np.concatenate(told)))
    return found


def routing_maps(case: Case) -> list[torch.Tensor]:
    maps = []
    for rank, tokens in enumerate(case.tokens):
        generator = torch.Generator().manual_seed(1000 * case.seed + rank)
        scores_TE = torch.rand(tokens, case.experts, generator=generator)
        if case.crowded:
            scores_TE -= torch.arange(case.experts)
        map_TE = torch.zeros(scores_TE.shape, dtype=torch.bool)
        map_TE.scatter_(1, scores_TE.topk(case.top_k, dim=1).indices, True)
        if tokens > 2:
            map_TE[1] = False  # a padding token
        maps.append(map_TE)
    return maps


def plan_of(case: Case, rank: int) -> MicrobatchPlan:
    layout = ExpertLayout.random(case.ranks, case.capacity, case.experts, (case.seed,))
    counts_NE = np.stack([map_TE.sum(0).numpy() for map_TE in routing_maps(case)])
    quotas = solve_quotas(Split.EXACT, counts_NE, layout, case.node_size)
    slot_expert_S = torch.from_numpy(layout.slot_expert_S.astype(np.int64))
    index: Any = SimpleNamespace(placed=SimpleNamespace(layout=layout), slot_expert_S=slot_expert_S)
    restored: Any = SimpleNamespace(index=index)
    mine = RankQuotas.of(layout, quotas.rank_row(rank), quotas.rank_columns(rank))
    return MicrobatchPlan(restored, mine, rows=int(counts_NE.sum()))


def make_dispatcher(
    plan: MicrobatchPlan,
    top_k: int,
    path: str,
    groups: FSEPGroups | None = None,
    *,
    shared: Any = None,
    times: Any = None,
) -> Any:
    """Make a dispatcher by "own" or "stock's" permutations, "nodes", "deepep" or "hybridep"."""
    from megatron.core.transformer import TransformerConfig

    from megatron_laer.layer.dispatch import choice
    from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatch
    from megatron_laer.runtime.comm.collectives import TokenSizesExchange

    is_flex = path in ("deepep", "hybridep")
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=plan.layout.num_slots,
        moe_router_topk=top_k,
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="flex" if is_flex else "alltoall",
        moe_flex_dispatcher_backend=path if is_flex else "deepep",
        moe_hybridep_pad_uneven_dispatch_inputs=True,
    )
    world: Any = SimpleNamespace(ep=dist.group.WORLD, expt_tp=None, tp_ep=dist.group.WORLD)
    capacity = plan.layout.capacity
    first = dist.get_rank() * capacity
    sizes = TokenSizesExchange(groups, CPU) if path == "nodes" and groups else None
    local, given = list(range(first, first + capacity)), cast("FSEPGroups", groups)
    dispatcher = choice.make_dispatcher(config, local, world, given, sizes)
    config.moe_permute_fusion = path == "stock's"
    config.moe_shared_expert_overlap = shared is not None
    if shared is not None:
        dispatcher.set_shared_experts(shared)
    dispatcher.begin(SlotDispatch(plan, "layer 1", times, verified=None))
    return dispatcher


def run(
    case: Case,
    groups: FSEPGroups,
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    with_shared: bool = False,
    rerun: bool = False,
) -> Outcome:
    """On a rank: dispatch tokens, let experts square and weigh them, combine, and run backward.

    A `rerun` under a checkpoint is given another routing than its plan's.
    """
    rank = groups.rank
    map_TE, plan = routing_maps(case)[rank], plan_of(case, rank)
    generator = torch.Generator().manual_seed(rank)
    tokens = len(map_TE)
    hidden = torch.randn(1, tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(map_TE.shape, generator=generator) * map_TE
    probs[:, 0] = 0  # tokens go to expert 0 even with probability zero
    probs.requires_grad_()
    grad = torch.randn(hidden.shape, generator=generator).to(dtype)
    if rerun:
        plan, map_TE = plan.for_rerun(map_TE), ~map_TE
    timed: list[tuple[str, str]] = []
    times = SimpleNamespace(
        begin_exchange=lambda name: timed.append(("begin", str(name))),
        end_exchange=lambda then: timed.append(("end", str(then))),
    )
    shared = shared_experts() if with_shared else None
    dispatcher = make_dispatcher(plan, case.top_k, path, groups, shared=shared, times=times)
    dispatcher.start_shared_experts(hidden)
    sent: dict[str, list[Sent]] = {}
    kept = _Kept()
    combined, experts = _forward(dispatcher, hidden, map_TE, probs, plan, sent, kept)
    kept_bytes = kept.total_bytes
    assert combined.shape == hidden.shape and combined.dtype == dtype
    with recorded(sent, "backward"):
        combined.backward(grad)
    assert hidden.grad is not None and probs.grad is not None
    calls = [name for name, *_ in shared.method_calls] if shared else []
    grads = [hidden.grad, probs.grad]
    return Outcome(experts, combined.detach(), grads, sent, kept_bytes, calls, timed)


def _forward(
    dispatcher: Any,
    hidden: torch.Tensor,
    map_TE: torch.Tensor,
    probs: torch.Tensor,
    plan: MicrobatchPlan,
    sent: dict[str, list[Sent]],
    kept: _Kept,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with kept.counting(), recorded(sent, "dispatch"):
        to_send = dispatcher.dispatch_preprocess(hidden, map_TE, probs)
        inputs, tokens_C, weights = dispatcher.dispatch_postprocess(
            *dispatcher.token_dispatch(*to_send)
        )
    assert tokens_C.tolist() == plan.quotas.tokens_C
    with kept.counting():
        outputs = _Experts.apply(inputs, weights)
    # Copies, since the dispatcher may free its own.
    experts = [inputs.detach().clone(), weights.detach()]
    arrived = getattr(dispatcher, "_experts_input", None)
    if arrived is not None:  # from which the dispatcher makes the experts' input anew
        kept.note(arrived[0])
    with kept.counting(), recorded(sent, "combine"):
        outputs = dispatcher.combine_preprocess(outputs)
        combined: torch.Tensor = dispatcher.combine_postprocess(dispatcher.token_combine(outputs))
    return combined, experts


class _Experts(torch.autograd.Function):
    """Square of tokens, weighed, that keeps its input, as a linear layer does."""

    @staticmethod
    def forward(ctx: Any, tokens_RH: torch.Tensor, weights_R: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens_RH, weights_R)
        return tokens_RH**2 * weights_R.unsqueeze(1).to(tokens_RH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_RH, weights_R = ctx.saved_tensors
        weights_R1 = weights_R.unsqueeze(1).to(grad_RH.dtype)
        grad_weights_R = (grad_RH * tokens_RH**2).sum(1).to(weights_R.dtype)
        return 2 * tokens_RH * weights_R1 * grad_RH, grad_weights_R


@contextlib.contextmanager
def recorded(sent: dict[str, list[Sent]], phase: str) -> Iterator[None]:
    """Record the rows that every All-to-All brings to this rank."""
    true_exchange, size = dist.all_to_all_single, dist.get_world_size()
    of_phase = sent.setdefault(phase, [])

    def exchange(
        received: torch.Tensor,
        given: torch.Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        group: Any = None,
        **options: Any,
    ) -> Any:
        if output_split_sizes is None:  # numbers, by a flex dispatcher's buffers
            return true_exchange(received, given, group=group, **options)
        rows_N = [0] * size
        for rank, rows in zip(dist.get_process_group_ranks(group), output_split_sizes, strict=True):
            rows_N[rank] = rows
        row_bytes = received[:1].element_size() * int(np.prod(received.shape[1:]))
        is_hidden = received.is_floating_point() and received.dim() == 2
        of_phase.append(Sent(tuple(rows_N), row_bytes, is_hidden))
        return true_exchange(
            received, given, output_split_sizes, input_split_sizes, group, **options
        )

    with mock.patch.object(dist, "all_to_all_single", exchange):
        yield


class _Kept:
    """Sum of the memory that autograd keeps inside, with shared storage counted once."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def total_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def counting(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda kept: kept)

    def note(self, kept: torch.Tensor) -> torch.Tensor:
        storage = kept.untyped_storage()
        # Held, so that no other storage reuses its address.
        self._storages[storage.data_ptr()] = storage
        return kept


def routing_of(case: Case) -> TokenRouting:
    from megatron_laer.layer.dispatch.token_routes import token_order

    maps = routing_maps(case)
    slots = [
        token_order(map_TE, plan_of(case, rank).quotas).numpy() for rank, map_TE in enumerate(maps)
    ]
    maps_N = [map_TE.numpy() for map_TE in maps]
    return TokenRouting.count(maps_N, slots, case.capacity, case.node_size)
