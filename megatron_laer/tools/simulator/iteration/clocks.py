"""Clocks of a stage's ranks, with their seconds by kind.

Max-plus: a waiting rank advances to the maximum of its clock and the awaited one, then adds its own
seconds. Operations of a stage have one order, so no queue of events is needed.

Legend: N ranks of a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

COMPUTE = ("attention", "dense", "experts", "optimizer")
# Compute that exchanges of experts slow down.
_SLOWED = ("attention", "dense", "experts")
EXPOSED = ("tokens", "restore", "reduce", "gate", "tensor", "data_parallel", "pipeline", "host")
# Attention with its exchange among tensor-parallel ranks.
OF_ATTENTION = ("attention", "tensor")
# Time in which a rank waits for others that compute longer.
WAITING = "waiting"
KINDS = (*COMPUTE, *EXPOSED, WAITING)

PARAMETERS, GRADIENTS = "parameters", "gradients"

INTRA, INTER = "intra", "inter"
# Contention of tokens with compute over that of weights and gradients: DeepEP takes 20 SMs, these 8
# or 16 (`card.exchange_ctas`).
_TOKENS_WEIGH = 20 / 12


@dataclass(eq=False)
class Flight:
    """An exchange under way, of tokens by rank; what shares its links moves its end."""

    link: str
    begin_s: Seconds | float
    end_s: Seconds | float

    def during(self, begin_s: Seconds | float, end_s: Seconds | float = math.inf) -> Seconds:
        """Return how long it is under way in this time."""
        begin_s, end_s = np.maximum(self.begin_s, begin_s), np.minimum(self.end_s, end_s)
        seconds_N: Seconds = np.maximum(end_s - begin_s, 0.0)
        return seconds_N

    def lengthen(self, seconds_N: Seconds) -> None:
        """Move the end; weights and gradients have one for all ranks."""
        if isinstance(self.end_s, float):
            self.end_s += float(seconds_N.max())
        else:
            self.end_s = self.end_s + seconds_N


class Clocks:
    """Clocks of one stage's ranks and of its communication streams.

    Exchanges of parameters and gradients involve all ranks, so they have one clock: an exchange
    starts with the last rank. Tokens are exchanged in groups, and wait for the last rank of each.
    Compute takes `pace` times as long as on an average card. During an exchange it is slower by
    `contention`, and the exchange by `stretch`. Exchanges over one class of links share it: while
    two are under way, each is half as fast. With `one_stream` parameters and gradients wait for
    each other. `gathered_s` and `scattered_s` are the ends of data-parallel exchanges.
    """

    def __init__(
        self,
        ranks: int,
        node_size: int,
        *,
        pace: float = 1.0,
        contention: float = 0.0,
        stretch: float = 1.0,
        one_stream: bool = False,
    ) -> None:
        self.now_N: Seconds = np.zeros(ranks)
        self.spent: dict[str, Seconds] = {kind: np.zeros(ranks) for kind in KINDS}
        self.gathered_s = self.scattered_s = 0.0
        self._node_size = node_size
        self._pace, self._contention, self._stretch = pace, contention, stretch
        self._flights = {stream: Flight(INTRA, 0.0, 0.0) for stream in (PARAMETERS, GRADIENTS)}
        self._sent: list[Flight] = []  # tokens under way
        self._one_stream = one_stream

    def work(self, kind: str, seconds: Seconds | float) -> None:
        if kind in _SLOWED:
            seconds = seconds * self._pace
            if self._contention > 0:
                seconds = seconds + self._contention * self._beside(seconds)
        self.now_N = self.now_N + seconds
        self.spent[kind] += seconds

    def wait(self, kind: str, until: Seconds | float) -> None:
        begin_N = self.now_N
        self.now_N = np.maximum(begin_N, until)
        self.spent[kind] += self.now_N - begin_N

    def meet(self, group: int | None = None, within_node: bool = False) -> None:
        """Advance ranks to the last of their node or of their `group` neighbours; None for all."""
        self.wait(WAITING, self._last(group, within_node))

    def exchange(self, stream: str, seconds: float, link: str) -> Flight:
        """Start an exchange of weights or gradients on its communication stream."""
        streams = (PARAMETERS, GRADIENTS) if self._one_stream else (stream,)
        free_s = max(float(self._flights[each].end_s) for each in streams)
        begin_s = max(float(self.now_N.max()), free_s)
        flight = Flight(link, begin_s, begin_s + seconds * self._stretch)
        self._share(flight)
        self._flights[stream] = flight
        return flight

    def send(
        self, seconds_N: Seconds, link: str, members: tuple[int | None, bool], *, is_hidden: bool
    ) -> Flight:
        """Start an exchange of tokens, during another pass or alone."""
        begin_N = self._last(*members)
        for before in self._sent:
            begin_N = np.maximum(begin_N, before.end_s)
        tokens = Flight(link, begin_N, begin_N + seconds_N * (self._stretch if is_hidden else 1.0))
        self._share(tokens)
        self._sent.append(tokens)
        return tokens

    def arrive(self, tokens: Flight) -> None:
        """Wait for tokens: for the last rank to send them, and for their way."""
        self.wait(WAITING, tokens.begin_s)
        self.wait("tokens", tokens.end_s)
        self._sent.remove(tokens)

    def scatter(self, seconds: float) -> None:
        """Start the reduce of a layer's gradients, after those before."""
        self.scattered_s = max(float(self.now_N.max()), self.scattered_s) + seconds

    def _last(self, group: int | None, within_node: bool) -> Seconds:
        size = group or len(self.now_N)
        if within_node:
            size = min(size, self._node_size)
        last_J = self.now_N.reshape(-1, size).max(axis=1)
        return np.repeat(last_J, size)

    def _share(self, flight: Flight) -> None:
        """Lengthen a new exchange, and those under way over the same links."""
        seconds = flight.end_s - flight.begin_s
        for other in (*self._flights.values(), *self._sent):
            if other.link == flight.link:
                shared_N = np.minimum(other.during(flight.begin_s), seconds)
                flight.lengthen(shared_N)
                other.lengthen(shared_N)

    def _beside(self, seconds: Seconds | float) -> Seconds:
        time = self.now_N, self.now_N + seconds
        longer_N = np.maximum(*(flight.during(*time) for flight in self._flights.values()))
        tokens_N = sum(tokens.during(*time) for tokens in self._sent)  # one after the other
        return np.maximum(longer_N, _TOKENS_WEIGH * tokens_N)
