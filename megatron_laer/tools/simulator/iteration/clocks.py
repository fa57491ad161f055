"""Clocks of a stage's ranks, with their seconds by kind.

Max-plus: a waiting rank advances to the maximum of its clock and the awaited one, then adds its own
seconds. Operations of a stage have one order, so no queue of events is needed.

Legend: N ranks of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

COMPUTE = ("attention", "dense", "experts", "optimizer")
# Compute that exchanges of experts slow down.
_SLOWED = ("attention", "dense", "experts")
EXPOSED = ("tokens", "restore", "reduce", "gate", "tensor", "data_parallel", "pipeline", "host")
# Time in which a rank waits for others that compute longer.
WAITING = "waiting"
KINDS = (*COMPUTE, *EXPOSED, WAITING)

PARAMETERS, GRADIENTS = "parameters", "gradients"

INTRA, INTER = "intra", "inter"


@dataclass
class Flight:
    """An exchange on a communication stream; what shares its links moves its end."""

    link: str
    begin_s: float
    end_s: float

    def remaining(self, begin_s: float) -> float:
        return max(self.end_s - max(self.begin_s, begin_s), 0.0)


class Clocks:
    """Clocks of one stage's ranks and of its communication streams.

    Exchanges involve all ranks, so a stream has one clock: an exchange starts with the last rank.
    Compute is slower by `contention` during an exchange, which is slower by `stretch` during
    compute. Exchanges over one class of links share it: while two are under way, each is half as
    fast. With `one_stream` parameters and gradients wait for each other. `gathered_s` and
    `scattered_s` are the ends of data-parallel exchanges.
    """

    def __init__(
        self,
        ranks: int,
        node_size: int,
        *,
        contention: float = 0.0,
        stretch: float = 1.0,
        one_stream: bool = False,
    ) -> None:
        self.now_N: Seconds = np.zeros(ranks)
        self.spent: dict[str, Seconds] = {kind: np.zeros(ranks) for kind in KINDS}
        self.gathered_s = self.scattered_s = self._scattering_s = 0.0
        self._node_size = node_size
        self._contention, self._stretch = contention, stretch
        self._flights = {stream: Flight(INTRA, 0.0, 0.0) for stream in (PARAMETERS, GRADIENTS)}
        self._one_stream = one_stream

    def work(self, kind: str, seconds: Seconds | float) -> None:
        if kind in _SLOWED and self._contention > 0:
            seconds = seconds + self._contention * self._beside(seconds)
        self.now_N = self.now_N + seconds
        self.spent[kind] += seconds

    def wait(self, kind: str, until: Seconds | float) -> None:
        begin_N = self.now_N
        self.now_N = np.maximum(begin_N, until)
        self.spent[kind] += self.now_N - begin_N

    def meet(self, group: int | None = None, within_node: bool = False) -> None:
        """Advance ranks to the last of their node or of their `group` neighbours; None for all."""
        size = group or len(self.now_N)
        if within_node:
            size = min(size, self._node_size)
        last_J = self.now_N.reshape(-1, size).max(axis=1)
        self.wait(WAITING, np.repeat(last_J, size))

    def exchange(self, stream: str, seconds: float, link: str) -> Flight:
        """Start an exchange on a communication stream."""
        free_s = self._flights[stream].end_s
        if self._one_stream:
            free_s = max(flight.end_s for flight in self._flights.values())
        begin_s = max(float(self.now_N.max()), free_s)
        seconds *= self._stretch
        flight = Flight(link, begin_s, begin_s + seconds)
        for other in self._flights.values():
            shared_s = min(other.remaining(begin_s), seconds) if other.link == link else 0.0
            other.end_s += shared_s
            flight.end_s += shared_s
        self._flights[stream] = flight
        return flight

    def scatter(self, seconds: float) -> None:
        """Start the reduce of a layer's gradients, after those before."""
        self._scattering_s = max(float(self.now_N.max()), self.scattered_s)
        self.scattered_s = self._scattering_s + seconds

    def gather_beside_scatter(self, begin_s: float, seconds: float) -> None:
        """Gather weights from `begin_s` on, over the links of the last reduce."""
        begin_s = max(self.gathered_s, begin_s)
        end_s = begin_s + seconds
        both_s = min(end_s, self.scattered_s) - max(begin_s, self._scattering_s)
        self.gathered_s = end_s + max(both_s, 0.0)
        self.scattered_s += max(both_s, 0.0)

    def tokens(self, seconds: Seconds, link: str) -> None:
        """Exchange tokens, which share their links with the exchanges under way."""
        begin_N = self.now_N
        for flight in self._flights.values():
            if flight.link != link:
                continue
            left_N = np.clip(flight.end_s - np.maximum(begin_N, flight.begin_s), 0.0, None)
            shared_N = np.minimum(left_N, seconds)
            seconds = seconds + shared_N
            flight.end_s += float(shared_N.max())
        self.work("tokens", seconds)

    def _beside(self, seconds: Seconds | float) -> Seconds:
        end_N = self.now_N + seconds
        shared = [
            np.clip(
                np.minimum(end_N, flight.end_s) - np.maximum(self.now_N, flight.begin_s), 0.0, None
            )
            for flight in self._flights.values()
        ]
        longer_N: Seconds = np.maximum(*shared)
        return longer_N
