"""Small collectives that synchronise counts, layouts, bytes and errors of an FSEP group's ranks.

Their meaning is decided elsewhere; expert weights are exchanged in `exchange.py`.

Legend: N ranks, E experts, S slots, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import experts_of_a_word
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.native_core import native
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.planner.token_rows import SizeMessages, TokenRows
from megatron_laer.runtime.comm.copies import Download, upload
from megatron_laer.runtime.comm.memory import empty, poison
from megatron_laer.runtime.comm.process_groups import FSEPGroups
from megatron_laer.support import RefusedError

# Numbers behind a rank's counts: a layout's version and digest, and the last decision's digest.
_TAGS = 3
# Types by the number of experts whose choices, a byte each, are added up as one integer.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class LayoutMismatchError(RuntimeError):
    """Different layouts for the same layer on ranks of an FSEP group."""


class CountsMismatchError(RuntimeError):
    """Tokens per expert of a rank that are not its router's."""


@dataclass(frozen=True)
class LayoutTag:
    """Identity of the layout that all ranks must have, sent with the counts to detect mismatches.

    Attributes:
        version: of the planned layouts.
        digest: of this layer's planned layout.
    """

    version: int
    digest: int

    def tensor(self, device: torch.device) -> torch.Tensor:
        return upload(torch.tensor([self.version, self.digest], dtype=torch.int64), device)


def decision_digest(layout: ExpertLayout, *, solved: bool) -> int:
    """Return the chosen layout's digest, with `solved`, even if not used, in the lowest bit."""
    return layout.digest & ~1 | solved


class CountsExchange:
    """Exchange of every rank's tokens per expert, while the host may enqueue other work.

    The layout's tag and the digest of the last decision reveal ranks that decided differently.
    Words of the router's map reveal a rank whose counts are wrong.
    """

    def __init__(self, groups: FSEPGroups, device: torch.device) -> None:
        self._groups = groups
        self._download = Download(device)

    def start(
        self,
        counts_E: torch.Tensor,
        routing_map_TE: torch.Tensor,
        tag_2: torch.Tensor,
        last_decision: int,
        layer: str,
    ) -> Callable[[], Int64]:
        """Start the exchange: one All-gather of N·(E + W + 3) integers, one copy to the host.

        Args:
            counts_E: int64, the map's sums over tokens.
            routing_map_TE: bool, by which tokens will be sent; its W words are counted anew.
            tag_2: `LayoutTag.tensor` of the layout that is planned for this layer.
            last_decision: `decision_digest` of this rank's last decision, in any layer; 0 before
                the first.

        Returns:
            A function that waits for the copy, the layer's only synchronisation, and returns
            counts_NE. It raises LayoutMismatchError on every rank of the group if tags or decisions
            differ, and CountsMismatchError if a rank's counts are not its map's.
        """
        # A kernel's argument needs no copy from the host.
        decision_1 = torch.full((1,), last_decision, dtype=torch.int64, device=counts_E.device)
        words_W = routing_words(routing_map_TE)
        payload = torch.cat([counts_E.to(torch.int64), words_W, tag_2, decision_1])
        gathered = poison(payload.new_empty(self._groups.size * payload.numel()))
        dist.all_gather_into_tensor(gathered, payload, group=self._groups.tokens)
        rows = gathered.view(self._groups.size, -1)
        return partial(self._finish, self._download.start(rows), len(words_W), layer)

    def _finish(self, read: Callable[[], torch.Tensor], words: int, layer: str) -> Int64:
        rows = read().numpy()
        counts_NE, wrong = native.agreed_counts(rows, words, _TAGS)
        if counts_NE is None:
            raise LayoutMismatchError(_describe_mismatch(rows[:, -_TAGS:], self._groups, layer))
        if wrong is not None:
            raise CountsMismatchError(_describe_counts(counts_NE, *wrong, self._groups, layer))
        return counts_NE


def routing_words(routing_map_TE: torch.Tensor) -> torch.Tensor:
    """Add up a router's map over tokens by another way than its counts: int64 [W], in one call.

    A word's sum is that of 256**e · count over its experts e. With four of them it cannot overflow,
    so no tokens can move between experts unseen.
    """
    dtype = _WORDS[experts_of_a_word(routing_map_TE.shape[1])]
    return routing_map_TE.view(dtype).sum(dim=0, dtype=torch.int64)


def _describe_counts(
    counts_NE: Int64, place: int, word: int, groups: FSEPGroups, layer: str
) -> str:
    size = experts_of_a_word(counts_NE.shape[1])
    first = word * size
    counts = counts_NE[place, first : first + size].tolist()
    return (
        f"FSEP {layer}: rank {groups.ranks[place]} (place {place} in the group) counted {counts} "
        f"tokens for experts {first} to {first + size - 1}, but its router's map has others. "
        "Tokens would be computed by the wrong experts, so every rank stops: look for code that "
        "changes the map or the counts behind the router, or for faulty memory on this rank."
    )


def _describe_mismatch(tags_N3: Int64, groups: FSEPGroups, layer: str) -> str:
    *layouts_differ, decisions_differ = (tags_N3 != tags_N3[0]).any(axis=0)
    tags, counts = np.unique(tags_N3, axis=0, return_counts=True)
    is_tie = (counts == counts.max()).sum() > 1
    right = tags[counts.argmax()]
    wrong = range(groups.size) if is_tie else np.flatnonzero((tags_N3 != right).any(axis=1))
    names = ", ".join(
        f"rank {groups.ranks[place]} (place {place} in the group) holds {_tag_text(tags_N3[place])}"
        for place in wrong
    )
    others = "the right one is unknown" if is_tie else f"the others hold {_tag_text(right)}"
    return " ".join(
        [
            f"FSEP {layer}: {names}; {others}.",
            *([_OTHER_LAYOUT] if any(layouts_differ) else []),
            *([_OTHER_DECISION] if decisions_differ else []),
        ]
    )


_OTHER_LAYOUT = (
    "Experts would be restored into the wrong slots, so every rank stops. Layouts change only at "
    "step boundaries, from the group's rank 0: look for code that steps some ranks and not others, "
    "or for faulty memory on the named rank."
)
_OTHER_DECISION = (
    "In the exchange before this one, ranks decided differently from the same counts, so experts "
    "may have been restored into the wrong slots, and every rank stops. Look for ranks with "
    "another NumPy, native core or cluster constants (compared before the first step), or for "
    "faulty memory on the named rank."
)


def _tag_text(tag_3: Int64) -> str:
    version, digest, decision = tag_3.tolist()
    return f"version {version}, digest {digest % 2**64:016x}, last decision {decision % 2**64:016x}"


class TokenSizesExchange:
    """Exchange of the numbers of rows that ranks need, while the host may enqueue other work."""

    def __init__(self, groups: FSEPGroups, device: torch.device) -> None:
        self._group = groups.tokens
        self._messages = SizeMessages(groups.rank, groups.size, groups.node_size)
        places_X = [place for message in self._messages.sent for place in message]
        self._places_X = torch.tensor(places_X, device=device)
        self._sent_N = [len(message) for message in self._messages.sent]
        self._received_N = [len(message) for message in self._messages.received]
        self._download = Download(device)

    def start(self, sizes_Z: torch.Tensor) -> Callable[[], TokenRows]:
        """Start the exchange: one All-to-All of a few integers, and one copy to the host.

        Args:
            sizes_Z: int32, this rank's rows to each rank, then those to each node.

        Returns:
            A function that waits for the copy, and returns this rank's rows.
        """
        told_X = sizes_Z.index_select(0, self._places_X)
        received = poison(sizes_Z.new_empty(sum(self._received_N)))
        dist.all_to_all_single(received, told_X, self._received_N, self._sent_N, group=self._group)
        return partial(self._wait_for_token_sizes, self._download.start(received))

    def _wait_for_token_sizes(self, read: Callable[[], torch.Tensor]) -> TokenRows:
        return self._messages.rows(read().long().numpy())


def broadcast_layouts(
    layouts: Sequence[ExpertLayout] | None,
    status: PlannerStatus,
    shape: tuple[int, int, int],
    num_layers: int,
    groups: FSEPGroups,
    download: Download,
) -> tuple[list[ExpertLayout] | None, PlannerStatus]:
    """Broadcast rank 0's next layouts, one per layer or None, and its planner's status.

    One small collective, for which the host waits; other ranks' layouts and status are ignored.
    `shape` is (N, C, E).
    """
    num_ranks, capacity, _ = shape
    slots_LS = np.zeros((num_layers, num_ranks * capacity), dtype=np.int16)
    header = np.array([0, status.plan_us, status.late_plans, status.failures], dtype=np.int64)
    if groups.rank == 0 and layouts is not None:
        header[0] = 1
        slots_LS[:] = [layout.slot_expert_S for layout in layouts]
    # As bytes, since neither NCCL nor gloo sends int16.
    message = np.frombuffer(bytearray(header.tobytes() + slots_LS.tobytes()), dtype=np.uint8)
    tensor = upload(torch.from_numpy(message), download.device)
    dist.broadcast(tensor, src=groups.planner_rank, group=groups.tokens)
    received = download.start(tensor)().numpy().tobytes()
    is_new, *numbers = np.frombuffer(received[: header.nbytes], dtype=np.int64).tolist()
    told = PlannerStatus(*numbers)
    if not is_new:
        return None, told
    slots_LS = np.frombuffer(received[header.nbytes :], dtype=np.int16).reshape(slots_LS.shape)
    return [ExpertLayout.from_slots(*shape, slots_S) for slots_S in slots_LS], told


def gather_integers(values: torch.Tensor, groups: FSEPGroups, device: torch.device) -> Int64:
    """Gather every rank's integers `[…]` of one shape, and wait for them; int64 `[N, …]`."""
    values = values.to(torch.int64)
    mine = upload(values, device) if values.device.type == "cpu" else values
    gathered = poison(mine.new_empty(groups.size * mine.numel()))
    dist.all_gather_into_tensor(gathered, mine.flatten(), group=groups.tokens)
    received: Int64 = gathered.view(groups.size, *mine.shape).cpu().numpy()
    return received


def add_up(parts: Sequence[torch.Tensor], groups: FSEPGroups) -> list[npt.NDArray[Any]]:
    """Add up every rank's tensors of one dtype, and wait for them. Integers wrap around."""
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=groups.tokens)
    of_parts = flat.cpu().split([part.numel() for part in parts])
    return [of.numpy().reshape(part.shape) for of, part in zip(of_parts, parts, strict=True)]


def broadcast_bytes(data: bytes, groups: FSEPGroups, device: torch.device) -> bytes:
    size = torch.tensor([len(data)], dtype=torch.int64, device=device)
    dist.broadcast(size, src=groups.planner_rank, group=groups.tokens)
    message = empty((int(size.item()),), torch.uint8, device)
    if groups.rank == 0 and data:
        message.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if message.numel():
        dist.broadcast(message, src=groups.planner_rank, group=groups.tokens)
    return message.cpu().numpy().tobytes()


def raise_everywhere(problem: str | None) -> None:
    """Raise any rank's problem on every rank of the world. Collective over the world."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise RefusedError(f"rank {rank}: {found}")
