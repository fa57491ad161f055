"""Passes of microbatches through model chunks, one at a time or two together, on the clocks.

Exchanges start where `schedule.py` says, as in the runtime's scheduler.

Legend: N ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.clocks import (
    GRADIENTS,
    INTRA,
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

    Pairs are forward and backward. `dense_s` is neither attention nor experts, `tensor_s`
    collectives among tensor-parallel ranks, `host_s` the host's time. Backward includes recompute,
    except with `again`, where it first runs forward again, with its exchanges of tokens, but
    without attention unless `attention_again`.
    `gather_s` and `scatter_s` exchange the layer's parameters and gradients; 0 in passes without.
    """

    name: str
    attention_s: tuple[float, float]
    dense_s: tuple[float, float]
    tensor_s: tuple[float, float]
    moe: MoETimes | None
    again: bool
    attention_again: bool = True
    host_s: tuple[float, float] = (0.0, 0.0)
    gather_s: float = 0.0
    scatter_s: float = 0.0


@dataclass(frozen=True)
class Following:
    """First MoE layer of the operation that follows, and whether that has the same microbatch."""

    layer: LayerTimes
    is_backward: bool
    same_microbatch: bool


_NOTHING_MOVES = Flight(INTRA, 0.0, 0.0)
# Parts of a layer without experts: as many as with them, so that layers run side by side.
_NO_EXPERTS = (None,) * 3


class _Restores:
    """Restores of a chunk's MoE layers in one pass, by the layer's number; each starts once.

    `fetched` is the first one, if the operation before has fetched it.
    """

    def __init__(
        self,
        clocks: Clocks,
        layers: Sequence[LayerTimes],
        fetched: Flight | None,
        *,
        backward: bool,
    ) -> None:
        self._clocks = clocks
        self._layers = [layer for layer in layers if layer.moe is not None]
        self._backward = backward
        self._flights: dict[int, Flight] = {}
        self.last = len(self._layers) - 1
        if fetched is not None:
            self._flights[self.last if backward else 0] = fetched

    def start(self, number: int) -> None:
        if not 0 <= number <= self.last or number in self._flights:
            return
        layer = self._layers[number]
        assert layer.moe is not None
        seconds = layer.moe.backward_restore_s if self._backward else layer.moe.restore_s
        self._exchange(number, seconds)

    def turn(self, number: int) -> None:
        """Start the restore for backward after a re-run of forward, if that needs another form."""
        moe = self._layers[number].moe
        assert moe is not None
        self._exchange(number, moe.after_rerun_s)

    def wait(self, number: int, change: Flight | None = None) -> None:
        flights = [flight for flight in (self._flights.get(number), change) if flight is not None]
        ready_s = max((flight.end_s for flight in flights), default=0.0)
        self._clocks.wait("restore", ready_s)

    def _exchange(self, number: int, seconds: float | None) -> None:
        moe = self._layers[number].moe
        assert moe is not None
        if seconds is not None:
            self._flights[number] = self._clocks.exchange(PARAMETERS, seconds, moe.exchange_link)


# A pass that pauses between parts of layers, and ends with the first restore of the operation that
# follows; None if it was not fetched.
Parts = Generator[None, None, Flight | None]


def run(*passes: Parts) -> Flight | None:
    """Run passes in turn by parts, and return what the last to end has fetched.

    Forward and backward of two microbatches make Megatron's combined 1F1B: tokens of one travel
    during compute of the other.
    """
    fetched: Flight | None = None
    going = [*passes]
    while going:
        for parts in [*going]:
            try:
                next(parts)
            except StopIteration as end:
                fetched = end.value
                going.remove(parts)
    return fetched


def forward(
    clocks: Clocks,
    layers: Sequence[LayerTimes],
    schedule: Schedule,
    fetched: Flight | None = None,
    following: Following | None = None,
    *,
    head_s: float = 0.0,
    in_turn: bool = False,
) -> Parts:
    """Run forward in three parts a layer: to the dispatch, which is sent, and to the combine.

    `fetched` is its first restore, `head_s` the time of the LM head, if it has one. With
    `in_turn` another pass hides its tokens.
    """
    restores = _Restores(clocks, layers, fetched, backward=False)
    number = -1
    if schedule.restores_forward:
        restores.start(0)
    for layer in layers:
        clocks.gathered_s += layer.gather_s
        if layer.gather_s > 0:
            clocks.wait("data_parallel", clocks.gathered_s)
        _dense(clocks, layer, 0)
        if layer.moe is None:
            yield from _NO_EXPERTS
            continue
        number += 1
        clocks.meet(layer.moe.group)
        clocks.work("gate", layer.moe.gate_s)
        change = None
        if schedule.restores_backward and not schedule.restores_forward:
            restores.start(number)  # its layout is known only now
        if layer.moe.change_s is not None:
            change = clocks.exchange(PARAMETERS, layer.moe.change_s, layer.moe.exchange_link)
        yield
        sent = _send(clocks, layer.moe, in_turn)
        yield
        clocks.arrive(sent)
        restores.start(number)  # if no rule has started it
        if schedule.restores_forward and not schedule.by_parts:
            restores.start(number + 1)
        if number == restores.last:
            fetched = _fetch(clocks, schedule, layer, following, in_backward=False)
        restores.wait(number, change)
        clocks.work("experts", layer.moe.forward_N)
        if schedule.restores_forward:
            restores.start(number + 1)
        sent = _send(clocks, layer.moe, in_turn)
        yield
        clocks.arrive(sent)
    clocks.work("dense", head_s)
    return fetched


def backward(
    clocks: Clocks,
    layers: Sequence[LayerTimes],
    schedule: Schedule,
    fetched: Flight | None = None,
    following: Following | None = None,
    *,
    head_s: float = 0.0,
    in_turn: bool = False,
) -> Parts:
    """Run backward, as `forward`: to the combine, which is sent, to the dispatch and beyond.

    By parts, experts' weight gradients take half of the time, after those of inputs have left.
    """
    clocks.work("dense", head_s)
    restores = _Restores(clocks, layers, fetched, backward=True)
    number = restores.last + 1
    reducing: Flight | None = None

    def await_reduce() -> None:
        nonlocal reducing
        if reducing is not None:
            clocks.wait("reduce", reducing.end_s)
            reducing = None

    if schedule.restores_backward:
        restores.start(restores.last)
    for layer in reversed(layers):
        moe = layer.moe
        if layer.again:
            _dense(clocks, layer, 0, attention=layer.attention_again)
        if moe is None:
            yield from _NO_EXPERTS
        else:
            number -= 1
            if layer.again:
                clocks.arrive(_send(clocks, moe, in_turn))
                restores.start(number)
                restores.wait(number)
                clocks.work("experts", moe.forward_N)
                restores.turn(number)
                if not schedule.delays_gradients:  # nothing is delayed without overlap
                    restores.wait(number)
                clocks.arrive(_send(clocks, moe, in_turn))
            sent = _send(clocks, moe, in_turn)
            yield
            clocks.arrive(sent)
            restores.start(number)
            if schedule.restores_backward and not schedule.by_parts:
                restores.start(number - 1)
            if number == 0:
                fetched = _fetch(clocks, schedule, layer, following, in_backward=True)
            restores.wait(number)
            experts_N = moe.backward_N / (2 if schedule.by_parts else 1)
            clocks.work("experts", experts_N)
            yield
            sent = _send(clocks, moe, in_turn)
            if schedule.by_parts:
                clocks.work("experts", experts_N)
            if schedule.restores_backward:
                restores.start(number - 1)
            yield
            clocks.arrive(sent)
            await_reduce()
            if moe.reduce_s is not None:
                reducing = clocks.exchange(GRADIENTS, moe.reduce_s, moe.exchange_link)
                if not schedule.delays_gradients:
                    await_reduce()
        _dense(clocks, layer, 1)
        if layer.again or schedule.by_parts:
            await_reduce()  # before the checkpoint or the part ends
        if layer.scatter_s > 0:
            clocks.scatter(layer.scatter_s)
    await_reduce()
    return fetched


def _fetch(
    clocks: Clocks,
    schedule: Schedule,
    present: LayerTimes,
    following: Following | None,
    *,
    in_backward: bool,
) -> Flight | None:
    """Start the restore of the first layer that follows, and return it; None without one.

    A layer that follows itself in the same form fetches only slots that differ. Those are priced as
    changed slots of the gate, or as all if every layout is made after it.
    """
    if following is None or not schedule.restores_following:
        return None
    layer, moe = following.layer, following.layer.moe
    assert moe is not None and present.moe is not None
    is_known = schedule.restores_backward if following.is_backward else schedule.restores_forward
    seconds = moe.backward_restore_s if following.is_backward else moe.restore_s
    if not is_known or seconds is None or (not following.is_backward and layer.gather_s > 0):
        return None
    in_its_form = in_backward == (following.is_backward and not layer.again)
    if layer.name == present.name and (moe.directions == 1 or in_its_form):
        if following.same_microbatch:
            return _NOTHING_MOVES
        if schedule.restores_forward:
            seconds = max(present.moe.change_s or 0.0, moe.change_s or 0.0)
    if not seconds:
        return _NOTHING_MOVES
    return clocks.exchange(PARAMETERS, seconds, moe.exchange_link)


def _dense(clocks: Clocks, layer: LayerTimes, direction: int, *, attention: bool = True) -> None:
    if attention:
        clocks.work("attention", layer.attention_s[direction])
        clocks.work("tensor", layer.tensor_s[direction])
    clocks.work("dense", layer.dense_s[direction])
    clocks.work("host", layer.host_s[direction])


def _send(clocks: Clocks, moe: MoETimes, in_turn: bool) -> Flight:
    members = moe.group, moe.within_node
    return clocks.send(moe.tokens_N, moe.tokens_link, members, is_hidden=in_turn)
