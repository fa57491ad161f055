"""Recorder of launches on the labelled device, for the times of `hardware_queues.py`.

A duration is bytes over a rate, or operations over that of a cluster's fastest GEMM, and a latency
for exchanges. The model that runs may be smaller than the one that is timed by the same factor in
each dimension.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.planner.clusters import Cluster
from megatron_laer.runtime.comm import steps
from tests.fake_cuda.clocks import HOST, Checker, Clock, Message
from tests.fake_cuda.hardware_queues import HostWait, Kernel, Program

GEMMS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
"""Operations that multiply the last two matrices which they read."""


@dataclass
class Recorded:
    """Launch, and the work of its kernel.

    Attributes:
        stream: name of its stream, if that has one.
        num_bytes: read and written.
        meets: names of communicators and their ranks, or the two of a message.
        moved_bytes: sent or received, the larger.
    """

    name: str
    stream: str
    after: set[int]
    num_bytes: int = 0
    flops: int = 0
    moved_bytes: float = 0.0
    meets: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)

    @property
    def is_copy(self) -> bool:
        """Return True for what FSEP copies before it sends and after it has received."""
        of_exchange = self.stream in ("the stream of parameters", "the stream of gradients")
        return of_exchange and not self.meets and "sum" not in self.name


Recording = list[Recorded | HostWait]


class Recorder(Checker):
    """Checker that also records what is launched from `start` to `stop`."""

    def __init__(self, place: Callable[[], str]) -> None:
        super().__init__(place)
        self.recording: Recording = []
        self._is_on = False
        self._places: dict[tuple[int, int], int] = {}
        self._shapes: list[torch.Size] = []
        # Of launches that are one; None outside of a group.
        self._together: list[int] | None = None

    def start(self) -> None:
        self.recording, self._places, self._is_on = [], {}, True

    def stop(self) -> None:
        self._is_on = False

    def enqueue(self, stream: int) -> int:
        number = super().enqueue(stream)
        if not self._is_on or stream == HOST:
            return number
        self._shapes = []
        after = self._places_of(self._clocks[stream] | {stream: number - 1})
        place = len(self.recording)
        if self._together:
            (place,) = self._together
            self._at(place).after |= after - {place}
        else:
            self.recording.append(Recorded("", self.names.get(stream, ""), after))
            if self._together is not None:
                self._together.append(place)
        self._places[stream, number] = place
        return number

    def host_waits(self, event: Clock) -> None:
        super().host_waits(event)
        if self._is_on and (after := self._places_of(event)):
            self.recording.append(HostWait(frozenset(after)))

    def access(
        self, stream: int, number: int, tensor: torch.Tensor, *, writes: bool, name: str
    ) -> None:
        super().access(stream, number, tensor, writes=writes, name=name)
        place = self._places.get((stream, number))
        if not self._is_on or place is None:
            return
        launch = self._at(place)
        launch.name = name
        launch.num_bytes += tensor.numel() * tensor.element_size()
        if not writes:
            self._shapes.append(tensor.shape)
        elif name in GEMMS:
            left, right = self._shapes[-2:]
            launch.flops = 2 * math.prod(left) * right[-1]

    def communicates(
        self, stream: int, number: int, group: Any, message: Message | None, num_bytes: int
    ) -> None:
        place = self._places.get((stream, number))
        if not self._is_on or place is None:
            return
        launch = self._at(place)
        members = tuple(dist.get_process_group_ranks(group))
        if message is None:
            launch.meets.add((group.group_name, members))
            launch.moved_bytes += num_bytes * (len(members) - 1) / len(members)
        else:
            ends = (dist.get_rank(), members[message.peer])
            launch.meets.add((group.group_name, ends if message.sends else ends[::-1]))
            launch.moved_bytes += num_bytes

    def _at(self, place: int) -> Recorded:
        launch = self.recording[place]
        assert isinstance(launch, Recorded)
        return launch

    def _places_of(self, clock: Clock) -> set[int]:
        """Return the places of the last kernels of each stream that a clock has."""
        found = (self._places.get(last) for last in clock.items())
        return {place for place in found if place is not None}

    @contextlib.contextmanager
    def together(self, *_: Any) -> Iterator[None]:
        """Record the block's collectives as one launch, as a group of NCCL is one."""
        self._together = []
        try:
            yield
        finally:
            self._together = None

    @contextlib.contextmanager
    def grouping(self) -> Iterator[None]:
        """Let operations that NCCL groups be recorded together."""
        batch = dist.batch_isend_irecv

        def together(operations: list[Any]) -> Any:
            with self.together():
                return batch(operations)

        with (
            mock.patch.object(dist, "batch_isend_irecv", together),
            mock.patch.object(steps, "one_launch", self.together),
        ):
            yield


def priced(
    recording: Sequence[Recorded | HostWait],
    cluster: Cluster,
    node_size: int,
    scale: int,
    *,
    in_place: bool = False,
) -> Program:
    """Return a program with the durations of a cluster, in nodes of this many ranks.

    The model is larger by `scale` in each dimension of its tensors. `in_place` leaves out the
    copies of exchanges.
    """
    flops_per_s = max(rate for _, rate in cluster.gemm.points)

    def seconds(launch: Recorded) -> float:
        if launch.meets:
            nodes = {rank // node_size for _, ranks in launch.meets for rank in ranks}
            link = cluster.intra if len(nodes) == 1 else cluster.inter
            return link.latency_s + launch.moved_bytes * scale**2 / link.bytes_per_s
        if in_place and launch.is_copy:
            return 0.0
        memory_s = launch.num_bytes * scale**2 / cluster.memory_bytes_per_s
        return max(memory_s, launch.flops * scale**3 / flops_per_s)

    return [
        Kernel(frozenset(item.after), seconds(item), tuple(item.meets), item.name)
        if isinstance(item, Recorded)
        else item
        for item in recording
    ]
