"""A layout's index tensors on the device, so that no exchange builds them again.

Holds no expert data and runs no collective.

Legend: N ranks, E experts, C slots per rank, S = N·C slots; G ranks per span (a node, or the whole
group), M = N/G spans, D distinct experts of a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.layout import ExpertLayout
from megatron_laer.sharding import changed_slots, node_sources

# Layouts whose index tensors are kept: those in force in all layers of a stage, and fresh ones.
_LAYOUTS = 256

# Pairs of index tensors: targets, all distinct, and the sources that are added to them.
Rounds = tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True, eq=False)
class LayoutIndex:
    """One layout on one device.

    Attributes:
        slot_expert_S: int64, the expert in each slot.
    """

    layout: ExpertLayout
    slot_expert_S: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.slot_expert_S.device


@dataclass(frozen=True, eq=False)
class RestoreIndex:
    """What one rank sends and receives to restore some slots of a layout.

    Attributes:
        anything: whether any rank has a slot to restore.
        sent_experts: the experts that span 0, span 1, … fetch: what this rank sends to the rank at
            its place in each span.
        fetched_M: how many those are.
        given_slots: this rank's slots, of what is kept, whose experts it gives to its span.
        given_G: how many experts each rank of this span gives.
        picked: for each slot to restore in this span, rank by rank, where its expert is among those
            that the span fetched and, after them, was given; or the expert itself where there is
            but one span.
        picked_M: the same with one entry per span: where that span's rows of the expert are if all
            spans' rows are equally many.
        restored_G: slots to restore on each rank of this span.
        runs: this rank's slots to restore as runs of neighbours: which of the rank's slots to
            restore a run begins with, and its slots.
    """

    anything: bool
    sent_experts: torch.Tensor
    fetched_M: list[int]
    given_slots: list[int]
    given_G: list[int]
    picked: torch.Tensor
    picked_M: torch.Tensor
    restored_G: list[int]
    runs: list[tuple[int, slice]]


@dataclass(frozen=True, eq=False)
class ReduceIndex:
    """How one rank sums the gradients of a layout's slots.

    Attributes:
        distinct_M: distinct experts of each span.
        in_span: sums the span's slots into its distinct experts, or into all experts where there is
            but one span; in slot order.
        over_spans: sums what the spans send, `distinct_M` each, into all experts; in span order.
    """

    distinct_M: list[int]
    in_span: Rounds
    over_spans: Rounds


@lru_cache(maxsize=_LAYOUTS)
def layout_index(layout: ExpertLayout, device: torch.device) -> LayoutIndex:
    """`layout` on `device`."""
    (slot_expert_S,) = _upload([layout.slot_expert_S.astype(np.int64)], device)
    return LayoutIndex(layout, slot_expert_S)


@lru_cache(maxsize=_LAYOUTS)
def restore_index(
    before: ExpertLayout | None,
    after: ExpertLayout,
    span: int,
    rank: int,
    device: torch.device,
) -> RestoreIndex:
    """The slots of `after` that hold another expert than under `before`, or all without one."""
    num_ranks, capacity = after.num_ranks, after.capacity
    if before is None:
        changed_S = np.ones(after.num_slots, dtype=np.bool_)
    else:
        changed_S = changed_slots(before, after)
    mine, spans = rank // span, num_ranks // span
    here = slice(mine * span * capacity, (mine + 1) * span * capacity)
    wanted = after.slot_expert_S.astype(np.int64)[here][changed_S[here]]
    sent, given = np.empty(0, np.int64), np.empty(0, np.int64)
    fetched_M, given_slots, given_G = [0] * spans, [], [0] * span
    picked_M = wanted[:, None]
    if spans > 1:
        sources = node_sources(after, span, changed_S, before)
        span_of_pair, sent = np.divmod(sources.far_pairs, after.num_experts)
        fetched_M = np.bincount(span_of_pair, minlength=spans).tolist()
        # Given experts arrive rank by rank, and per rank in the order of its slots.
        order = np.argsort(sources.held_slots)
        slots, experts = sources.held_slots[order], sources.held_pairs[order] % after.num_experts
        in_span = slots // (span * capacity) == mine
        slots, given = slots[in_span], experts[in_span]
        given_G = np.bincount(slots // capacity - mine * span, minlength=span).tolist()
        given_slots = (slots[slots // capacity == rank] % capacity).tolist()

        place_E = np.full(after.num_experts, -1)
        place_E[sent[span_of_pair == mine]] = np.arange(fetched_M[mine])
        place_E[given] = fetched_M[mine] + np.arange(len(given))
        wanted = place_E[wanted]
        # Fetched rows come span by span, D each; given ones expert by expert, M spans each.
        fetched = wanted < fetched_M[mine]
        stride = np.where(fetched, fetched_M[mine], 1)
        first = np.where(fetched, wanted, wanted * spans)
        picked_M = first[:, None] + stride[:, None] * np.arange(spans)
    restored_N = changed_S.reshape(num_ranks, capacity).sum(axis=1)
    sent_experts, picked, picked_M = _upload([sent, wanted, picked_M.reshape(-1)], device)
    return RestoreIndex(
        anything=bool(changed_S.any()),
        sent_experts=sent_experts,
        fetched_M=fetched_M,
        given_slots=given_slots,
        given_G=given_G,
        picked=picked,
        picked_M=picked_M,
        restored_G=restored_N[mine * span : (mine + 1) * span].tolist(),
        runs=_runs(np.flatnonzero(changed_S[rank * capacity : (rank + 1) * capacity])),
    )


@lru_cache(maxsize=_LAYOUTS)
def reduce_index(layout: ExpertLayout, span: int, rank: int, device: torch.device) -> ReduceIndex:
    """The sums over replicas as the rank computes them."""
    slot_expert_S = layout.slot_expert_S.astype(np.int64)
    if layout.num_ranks == span:
        return ReduceIndex([], _rounds(slot_expert_S, device), ())
    mine = rank // span
    all_S = np.ones(layout.num_slots, dtype=np.bool_)
    span_of_pair, experts = np.divmod(
        node_sources(layout, span, all_S).far_pairs, layout.num_experts
    )
    slots = span * layout.capacity
    mine_S = slot_expert_S[mine * slots : (mine + 1) * slots]
    in_span = np.searchsorted(experts[span_of_pair == mine], mine_S)
    return ReduceIndex(
        distinct_M=np.bincount(span_of_pair, minlength=layout.num_ranks // span).tolist(),
        in_span=_rounds(in_span, device),
        over_spans=_rounds(experts, device),
    )


def _rounds(target_of_source: Int64, device: torch.device) -> Rounds:
    """The order in which sources are added to their targets.

    Round j pairs every target that has more than j sources with its j-th source. Targets of a round
    are distinct, so adding a round needs no atomics, and a target's sources are added in their
    order: bitwise the same every time. Every target has a source, so round 0 has all of them.
    """
    by_target = np.argsort(target_of_source, kind="stable")
    counts = np.bincount(target_of_source)
    first = np.cumsum(counts) - counts
    arrays: list[Int64] = []
    for j in range(int(counts.max())):
        targets = np.flatnonzero(counts > j)
        arrays += [targets, by_target[first[targets] + j]]
    tensors = _upload(arrays, device)
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))


def _runs(slots: Int64) -> list[tuple[int, slice]]:
    """Ascending slots as runs of neighbours, each with how many slots come before it."""
    runs, first = [], 0
    for run in np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1):
        if len(run):
            runs.append((first, slice(int(run[0]), int(run[-1]) + 1)))
        first += len(run)
    return runs


def _upload(arrays: Sequence[Int64], device: torch.device) -> list[torch.Tensor]:
    """Arrays on the device, by one copy.

    On CUDA the copy runs on a stream of its own, which is waited for: so the tensors may be used on
    any stream at once, and the wait is never behind queued compute. They outlive any kernel that
    reads them, because many newer layouts must come before a cache lets go of them.
    """
    packed = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        with torch.cuda.stream(_upload_stream(device)):
            packed = packed.to(device)
    return list(packed.split([len(array) for array in arrays]))


@cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
