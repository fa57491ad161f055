"""Passes of microbatches through model chunks, one at a time or two together, on the clocks.

Exchanges start where `schedule.py` says, as in the runtime's scheduler.

Legend: N ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.clocks import (
    GRADIENTS,
    INTRA,
    OF_ATTENTION,
    PARAMETERS,
    Clocks,
    Flight,
    Seconds,
)


@dataclass(frozen=True, eq=False)
class MoETimes:
    """Seconds of the parts of a MoE layer for one microbatch.

    `backward_N` includes recompute. `tokens_N` is one exchange of tokens, in which ranks wait for
    their node only if `within_node`. `gate_s` is exchange of counts, decision and quotas. Exchanges
    of experts are None in passes without; `change_s` fetches changed slots. `group` is the number
    of neighbours that exchange tokens and counts; None for all ranks. The links are the classes
    that tokens and experts are slowest on. With two `directions` backward needs another form of
    weights than forward, in a restore of `after_rerun_s` where forward runs again.
    """

    forward_N: Seconds
    backward_N: Seconds
    tokens_N: Seconds
    within_node: bool
    gate_s: float
    restore_s: float | None
    backward_restore_s: float | None
    reduce_s: float | None
    change_s: float | None
    group: int | None = None
    tokens_link: str = INTRA
    exchange_link: str = INTRA
    directions: int = 1
    after_rerun_s: float | None = None


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Seconds of the parts of a layer for one microbatch.

    `alone_s` are those without experts by kind, in order, of forward and of backward. Backward
    includes recompute, except with `again`, where it first runs forward again, with its exchanges
    of tokens, but without attention unless `attention_again`.
    `gather_s` and `scatter_s` exchange the layer's parameters and gradients; 0 in passes without.
    """

    name: str
    alone_s: tuple[Mapping[str, float], Mapping[str, float]]
    moe: MoETimes | None
    again: bool
    attention_again: bool = True
    gather_s: float = 0.0
    scatter_s: float = 0.0


@dataclass(frozen=True)
class Following:
    """First MoE layer of the operation that follows, and whether that has the same microbatch.

    With `stays` a forward, which runs together with this operation or is this one, leaves its last
    layer's weights to its backward, which comes next.
    """

    layer: LayerTimes
    is_backward: bool
    same_microbatch: bool
    stays: bool = False


_NOTHING_MOVES = Flight(INTRA, 0.0, 0.0)
# Parts of a layer without experts: as many as with them, so that layers run side by side.
_NO_EXPERTS = (None,) * 3
# A pass that pauses between parts of layers, and ends with the first restore of the operation that
# follows; None if it was not fetched.
Parts = Generator[None, None, Flight | None]


def run(*passes: Parts) -> list[Flight | None]:
    """Run passes in turn by parts, and return what each has fetched.

    Forward and backward of two microbatches make Megatron's combined 1F1B: tokens of one travel
    during compute of the other.
    """
    fetched: dict[Parts, Flight | None] = {}
    while len(fetched) < len(passes):
        for parts in passes:
            if parts in fetched:
                continue
            try:
                next(parts)
            except StopIteration as end:
                fetched[parts] = end.value
    return [fetched[parts] for parts in passes]


class Pass:
    """One direction of a microbatch through a chunk's layers; each restore starts once.

    `fetched` is its first restore, if the operation before has fetched it, `head_s` the time of the
    LM head, if the chunk has one. With `in_turn` another pass hides its tokens.
    """

    def __init__(
        self,
        clocks: Clocks,
        layers: Sequence[LayerTimes],
        schedule: Schedule,
        fetched: Flight | None = None,
        following: Following | None = None,
        *,
        is_backward: bool,
        head_s: float = 0.0,
        in_turn: bool = False,
    ) -> None:
        self._clocks, self._layers, self._schedule = clocks, layers, schedule
        self._fetched, self._following, self._is_backward = fetched, following, is_backward
        self._head_s, self._in_turn = head_s, in_turn
        self._moes = [layer.moe for layer in layers if layer.moe is not None]
        self._last = len(self._moes) - 1
        self._flights: dict[int, Flight] = {}  # by the number of a layer with experts
        if fetched is not None:
            self._flights[self._last if is_backward else 0] = fetched

    def parts(self) -> Parts:
        return self._backward() if self._is_backward else self._forward()

    def _forward(self) -> Parts:
        """Run three parts a layer: to the dispatch, which is sent, to the combine, and on."""
        clocks, schedule = self._clocks, self._schedule
        number = -1
        if schedule.restores_forward:
            self._start(0)
        for layer in self._layers:
            moe = layer.moe
            clocks.gathered_s += layer.gather_s
            if layer.gather_s > 0:
                clocks.wait("data_parallel", clocks.gathered_s)
            self._dense(layer, 0)
            if moe is None:
                yield from _NO_EXPERTS
                continue
            number += 1
            clocks.meet(moe.group)
            clocks.work("gate", moe.gate_s)
            change = None
            if schedule.restores_backward and not schedule.restores_forward:
                self._start(number)  # its layout is known only now
            if moe.change_s is not None:
                change = clocks.exchange(PARAMETERS, moe.change_s, moe.exchange_link)
            yield
            sent = self._send(moe)
            yield
            clocks.arrive(sent)
            self._start(number)  # if no rule has started it
            if schedule.restores_forward:
                self._start(number + 1)
            if number == self._last:
                self._fetched = self._fetch(layer)
            self._wait(number, change)
            clocks.work("experts", moe.forward_N)
            sent = self._send(moe)
            yield
            clocks.arrive(sent)
        clocks.work("dense", self._head_s)
        return self._fetched

    def _backward(self) -> Parts:
        """Run parts as forward: to the combine, which is sent, to the dispatch and to the end.

        By parts, experts' weight gradients take half of the time, after those of inputs have left.
        """
        clocks, schedule = self._clocks, self._schedule
        clocks.work("dense", self._head_s)
        number = self._last + 1
        reducing: Flight | None = None

        def await_reduce() -> None:
            nonlocal reducing
            if reducing is not None:
                clocks.wait("reduce", reducing.end_s)
                reducing = None

        if schedule.restores_backward:
            self._start(self._last)
        for layer in reversed(self._layers):
            moe = layer.moe
            if layer.again:
                self._dense(layer, 0, attention=layer.attention_again)
            if moe is None:
                yield from _NO_EXPERTS
            else:
                number -= 1
                if layer.again:
                    self._run_again(number, moe)
                sent = self._send(moe)
                yield
                clocks.arrive(sent)
                self._start(number)
                if schedule.restores_backward:
                    self._start(number - 1)
                if number == 0:
                    self._fetched = self._fetch(layer)
                self._wait(number)
                experts_N = moe.backward_N / (2 if schedule.by_parts else 1)
                clocks.work("experts", experts_N)
                yield
                sent = self._send(moe)
                if schedule.by_parts:
                    clocks.work("experts", experts_N)
                yield
                clocks.arrive(sent)
                await_reduce()
                if moe.reduce_s is not None:
                    reducing = clocks.exchange(GRADIENTS, moe.reduce_s, moe.exchange_link)
                    if not schedule.delays_gradients:
                        await_reduce()
            self._dense(layer, 1)
            if layer.again or schedule.by_parts:
                await_reduce()  # before the checkpoint or the part ends
            if layer.scatter_s > 0:
                clocks.scatter(layer.scatter_s)
        await_reduce()
        return self._fetched

    def _run_again(self, number: int, moe: MoETimes) -> None:
        """Run forward of experts again, and restore for backward if that needs another form."""
        self._clocks.arrive(self._send(moe))
        self._start(number)
        self._wait(number)
        self._clocks.work("experts", moe.forward_N)
        self._exchange(number, moe.after_rerun_s)
        if not self._schedule.delays_gradients:  # nothing is delayed without overlap
            self._wait(number)
        self._clocks.arrive(self._send(moe))

    def _start(self, number: int) -> None:
        """Start a layer's restore, unless it has started."""
        if 0 <= number <= self._last and number not in self._flights:
            moe = self._moes[number]
            self._exchange(number, moe.backward_restore_s if self._is_backward else moe.restore_s)

    def _exchange(self, number: int, seconds: float | None) -> None:
        if seconds is not None:
            link = self._moes[number].exchange_link
            self._flights[number] = self._clocks.exchange(PARAMETERS, seconds, link)

    def _wait(self, number: int, change: Flight | None = None) -> None:
        flights = (self._flights.get(number), change)
        ready_s = max((flight.end_s for flight in flights if flight is not None), default=0.0)
        self._clocks.wait("restore", ready_s)

    def _fetch(self, present: LayerTimes) -> Flight | None:
        """Start the restore of the first layer that follows, and return it; None without one.

        A layer that follows itself in the same form fetches only slots that differ. Those are
        priced as changed slots of the gate, or as all if every layout is made after it.
        """
        following, schedule = self._following, self._schedule
        if following is None or not schedule.restores_following:
            return None
        layer, moe, to_backward = following.layer, following.layer.moe, following.is_backward
        assert moe is not None and present.moe is not None
        is_known = schedule.restores_backward if to_backward else schedule.restores_forward
        seconds = moe.backward_restore_s if to_backward else moe.restore_s
        if not is_known or seconds is None or (not to_backward and layer.gather_s > 0):
            return None
        stays = following.stays and moe.directions == 1
        if stays and to_backward:
            return _NOTHING_MOVES
        in_its_form = self._is_backward == (to_backward and not layer.again)
        if layer.name == present.name and not stays and (moe.directions == 1 or in_its_form):
            if following.same_microbatch:
                return _NOTHING_MOVES
            if schedule.restores_forward:
                seconds = max(present.moe.change_s or 0.0, moe.change_s or 0.0)
        if not seconds:
            return _NOTHING_MOVES
        return self._clocks.exchange(PARAMETERS, seconds, moe.exchange_link)

    def _dense(self, layer: LayerTimes, direction: int, *, attention: bool = True) -> None:
        for kind, seconds in layer.alone_s[direction].items():
            if attention or kind not in OF_ATTENTION:
                self._clocks.work(kind, seconds)

    def _send(self, moe: MoETimes) -> Flight:
        members = moe.group, moe.within_node
        return self._clocks.send(moe.tokens_N, moe.tokens_link, members, is_hidden=self._in_turn)
