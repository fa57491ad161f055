"""Record of each rank's launches on every communicator, and checks of their orders.

On CUDA a communication stream launches its collectives in program order. On the CPU a thread would
run them later; here streams do the work at once, at the same places in the program.

A set of ranks cannot hang, even if a device ran one launch after the other, if
- the k-th collective of a communicator is the same on all of its members, sizes included;
- the k-th message from one rank to another is received as the k-th one;
- program orders agree: no chain of launches, each before the next on some rank, ends where it
  began. A collective on several ranks, like a message sent and received, is one link of a chain.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

Sizes = tuple[Any, ...]

# Python's ways to communicate over a process group, by the names of all torch versions. Exchanges
# with splits have the arguments of `all_to_all_single`.
WITH_SPLITS = ("all_to_all_single", "alltoall_base")
_WITH_ROOT = ("gather", "gather_single", "scatter")  # lists of tensors on the root only
_POINT_TO_POINT = ("send", "recv")
_OTHERS = """
    allreduce allreduce_coalesced reduce broadcast barrier
    allgather _allgather_base all_gather_single allgather_coalesced all_gather_single_coalesced
    allgather_into_tensor_coalesced
    reduce_scatter _reduce_scatter_base reduce_scatter_single reduce_scatter_single_coalesced
    reduce_scatter_tensor_coalesced alltoall recv_anysource
""".split()


@dataclass(frozen=True)
class Launch:
    """Operation that a rank launched.

    `group` and `description` name the communicator, whose `members` are ranks of the world. `sizes`
    are equal on all members, except for exchanges with splits, which have received and sent sizes
    by member. `peer` is the other rank of a message. All operations of a batch are launched at
    once.
    """

    group: str
    description: str
    members: tuple[int, ...]
    operation: str
    sizes: Sizes
    peer: int | None
    batch: int


@contextlib.contextmanager
def recorded(launches: list[Launch]) -> Iterator[None]:
    from megatron_laer.runtime import build

    make_comm_stream, batch_isend_irecv = build.make_comm_stream, dist.batch_isend_irecv
    batches, is_batch = 0, False

    def record(name: str, group: dist.ProcessGroup, args: tuple[Any, ...]) -> None:
        nonlocal batches
        members = tuple(dist.get_process_group_ranks(group))
        peer = members[args[1]] if name in _POINT_TO_POINT else None
        sizes = _sizes(name, len(members), args)
        launch = Launch(group.group_name, group.group_desc, members, name, sizes, peer, batches)
        launches.append(launch)
        batches += not is_batch

    def recording(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            record(name, self, (*args, *kwargs.values()))
            return operation(self, *args, **kwargs)

        return launch

    def batch(operations: list[Any]) -> Any:
        nonlocal batches, is_batch
        is_batch = True
        try:
            return batch_isend_irecv(operations)
        finally:
            batches, is_batch = batches + 1, False

    def at_once(name: str, device: torch.device, *, overlaps: bool) -> Any:
        return make_comm_stream(name, device, overlaps=False)

    with contextlib.ExitStack() as stack:
        for name in (*WITH_SPLITS, *_WITH_ROOT, *_POINT_TO_POINT, *_OTHERS):
            operation = getattr(dist.ProcessGroup, name, None)
            if operation is not None:
                patch = mock.patch.object(dist.ProcessGroup, name, recording(name, operation))
                stack.enter_context(patch)
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", batch))
        stack.enter_context(mock.patch.object(build, "make_comm_stream", at_once))
        yield


def _sizes(name: str, num_members: int, args: tuple[Any, ...]) -> Sizes:
    if name in WITH_SPLITS:
        received, sent, *splits = args[:4]
        return tuple(
            tuple(_elements(tensor, sizes, num_members))
            for tensor, sizes in zip((received, sent), splits, strict=True)
        )
    root = getattr(args[-1], "rootRank", None) if args else None
    if name in _WITH_ROOT:
        return (root,)
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    return (root, *((tensor.numel(), str(tensor.dtype)) for tensor in tensors))


def _elements(tensor: torch.Tensor, splits: Sequence[int], num_members: int) -> list[int]:
    """Return elements for each member; no splits are equal ones."""
    if not splits:
        return [tensor.numel() // num_members] * num_members
    row = tensor.numel() // max(1, tensor.shape[0])
    return [size * row for size in splits]


Place = tuple[int, int]  # rank, and number of the launch on it


def problems(launches: Sequence[Sequence[Launch]]) -> list[str]:
    """Return possible hangs, given every rank's launches; the first one is the earliest."""
    found, pairs = _unequal(launches)
    return found or _cycle(launches, pairs)


def _unequal(launches: Sequence[Sequence[Launch]]) -> tuple[list[str], list[list[Place]]]:
    """Return operations without matching partners, and the places of those that match.

    Those of one communicator match in order on its members, messages from one rank to another at
    their two ends.
    """
    used: dict[tuple[str, str, tuple[object, ...]], dict[object, list[Place]]] = {}
    for rank, of_rank in enumerate(launches):
        for number, launch in enumerate(of_rank):
            name, end, ends = f"collective {launch.description}", rank, launch.members
            if launch.peer is not None:
                way = (rank, launch.peer)[:: 1 if launch.operation == "send" else -1]
                name = "messages from {} to {}".format(*way)
                end, ends = launch.operation, _POINT_TO_POINT
            by_end = used.setdefault((name, launch.group, ends), defaultdict(list))
            by_end[end].append((rank, number))

    found, same = [], []
    for (name, _, ends), by_end in used.items():
        for k in range(max(map(len, by_end.values()))):
            missing = [end for end in ends if k >= len(by_end[end])]
            places = [by_end[end][k] for end in ends if end not in missing]
            wrong = _misfit([launches[rank][number] for rank, number in places])
            if wrong or missing:
                found.append(f"{name}, {k}: {wrong or f'not launched by {missing}'}")
                break
            same.append(places)
    return found, same


def _misfit(launches: Sequence[Launch]) -> str | None:
    operations = [launch.operation for launch in launches]
    if launches[0].peer is None and len(set(operations)) > 1:
        return f"operations {operations}"
    sizes = [launch.sizes for launch in launches]
    if operations[0] in WITH_SPLITS:
        sent = [[of_rank[1][target] for of_rank in sizes] for target in range(len(sizes))]
        received = [list(of_rank[0]) for of_rank in sizes]
        return None if sent == received else f"{operations[0]}: {sent} sent, {received} received"
    return None if len(set(sizes)) == 1 else f"{operations[0]}: sizes {sizes}"


def _cycle(launches: Sequence[Sequence[Launch]], same: Iterable[list[Place]]) -> list[str]:
    """Return a chain of launches that ends where it began, if there is one."""
    event_of: dict[Place, Place] = {
        (rank, number): (rank, number)
        for rank, of_rank in enumerate(launches)
        for number in range(len(of_rank))
    }
    for places in same:
        for place in places:
            event_of[place] = places[0]

    order = TopologicalSorter[Place]()
    for rank, of_rank in enumerate(launches):
        batches: dict[int, list[Place]] = defaultdict(list)
        for number, launch in enumerate(of_rank):
            batches[launch.batch].append(event_of[rank, number])
        for earlier, later in pairwise(batches.values()):
            for event in later:
                order.add(event, *earlier)
    try:
        order.prepare()
    except CycleError as error:
        chain: list[Place] = error.args[1][1:]  # its first is its last
        names = [launches[rank][number] for rank, number in chain[:8]]
        text = " → ".join(f"{name.description} {name.operation}" for name in names)
        return [f"a circle of {len(chain)} launches: {text}"]
    return []
