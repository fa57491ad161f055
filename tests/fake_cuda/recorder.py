"""Order of launches on a card with one hardware queue (`CUDA_DEVICE_MAX_CONNECTIONS=1`).

Such a card starts kernels in the order of their launch, so one that waits stops all later ones. An
exchange of ours takes time. Hence no launch that waits for it may follow right behind it, with no
other stream's between, while a later matrix product does not need it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.fake_cuda import findings
from tests.fake_cuda.clocks import HOST, Checker

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
_OURS = "the stream of "


@dataclass
class _Launch:
    """Launch on a stream, and the launches that end before it starts, by their places."""

    stream: str
    after: set[int]
    name: str = ""
    exchanges: bool = False

    def __str__(self) -> str:
        return f"{self.name} on {self.stream}"


class Recorder(Checker):
    """Checker that also records the launches of the steady state."""

    def __init__(self, place: Callable[[], str]) -> None:
        super().__init__(place)
        self._launches: list[_Launch] = []
        self._places: dict[tuple[int, int], int] = {}
        # Of launches that are one; None outside of a group.
        self._together: list[int] | None = None

    def enqueue(self, stream: int) -> int:
        number = super().enqueue(stream)
        if stream == HOST or not findings.current.is_steady:
            return number
        last = (self._clocks[stream] | {stream: number - 1}).items()
        after = {self._places[one] for one in last if one in self._places}
        place = len(self._launches)
        if self._together:
            (place,) = self._together
            self._launches[place].after |= after - {place}
        else:
            self._launches.append(_Launch(self._name(stream), after))
            if self._together is not None:
                self._together.append(place)
        self._places[stream, number] = place
        return number

    def access(
        self, stream: int, number: int, tensor: torch.Tensor, *, writes: bool, name: str
    ) -> None:
        super().access(stream, number, tensor, writes=writes, name=name)
        if (place := self._places.get((stream, number))) is not None:
            self._launches[place].name = name

    def exchanged(self, stream: int, number: int) -> None:
        if (place := self._places.get((stream, number))) is not None:
            self._launches[place].exchanges = True

    def held_up(self) -> list[str]:
        """Return launches that wait for an exchange of ours too early, each once."""
        needs: list[int] = []  # of each launch, all that end before it, as bits
        for launch in self._launches:
            bits = 0
            for other in launch.after:
                bits |= needs[other] | 1 << other
            needs.append(bits)
        products = [at for at, launch in enumerate(self._launches) if launch.name in _PRODUCTS]
        found: dict[str, None] = {}
        for place, launch in enumerate(self._launches):
            for at in launch.after:
                exchange = self._launches[at]
                is_ours = exchange.exchanges and exchange.stream.startswith(_OURS)
                between = self._launches[at + 1 : place]
                if is_ours and all(other.stream == exchange.stream for other in between):
                    later = (product for product in products if product > place)
                    if any(not needs[product] >> at & 1 for product in later):
                        found[f"{launch} waits for {exchange}, and later products do not"] = None
        return list(found)

    @contextlib.contextmanager
    def grouping(self) -> Iterator[None]:
        """Record operations together that NCCL launches as one kernel."""
        batch = dist.batch_isend_irecv

        def together(operations: list[Any]) -> Any:
            with self._one_launch():
                return batch(operations)

        with mock.patch.object(dist, "batch_isend_irecv", together):
            yield

    @contextlib.contextmanager
    def _one_launch(self) -> Iterator[None]:
        self._together = []
        try:
            yield
        finally:
            self._together = None
