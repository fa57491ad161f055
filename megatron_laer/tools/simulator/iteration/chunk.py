"""One pass of a microbatch through a model chunk, forward or backward, on the clocks.

Exchanges start where `schedule.py` says, as in the runtime's scheduler.

Legend: N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.clocks import GRADIENTS, PARAMETERS, Clocks, Seconds


@dataclass(frozen=True, eq=False)
class MoETimes:
    """Seconds of the parts of a MoE layer for one microbatch.

    Attributes:
        forward_N, backward_N: compute of the experts; `backward_N` includes recompute.
        tokens_N, within_node: one exchange of tokens, and whether ranks wait for their node only.
        gate_s: exchange of counts, decision and quotas.
        restore_s, backward_restore_s, reduce_s: of the experts; None if this pass has none.
        change_s: fetching changed slots after the gate; None if there are none.
        group: number of neighbours that exchange tokens and counts; None for all ranks.
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


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Seconds of the parts of a layer for one microbatch.

    Attributes:
        attention_s, dense_s: forward, backward; `dense_s` is neither attention nor experts.
            Backward includes recompute, except for `again`.
        tensor_s: collectives among tensor-parallel ranks, forward and backward.
        again: whether backward first runs forward again, with its exchanges of tokens.
        host_s: launches of small kernels, per direction.
        gather_s, scatter_s: data-parallel exchanges of the layer's parameters and gradients; 0 in
            passes without.
    """

    name: str
    attention_s: tuple[float, float]
    dense_s: tuple[float, float]
    tensor_s: tuple[float, float]
    moe: MoETimes | None
    again: bool
    host_s: float = 0.0
    gather_s: float = 0.0
    scatter_s: float = 0.0


def forward(clocks: Clocks, layers: Sequence[LayerTimes], schedule: Schedule) -> None:
    with_experts = [place for place, layer in enumerate(layers) if layer.moe is not None]
    restored_s: dict[int, float] = {}

    def restore(number: int) -> None:
        """Start the restore of the chunk's MoE layer `number`, once."""
        if number not in range(len(with_experts)) or number in restored_s:
            return
        layer = layers[with_experts[number]]
        assert layer.moe is not None
        if layer.moe.restore_s is not None:
            label = f"restore {layer.name}"
            restored_s[number] = clocks.exchange(PARAMETERS, layer.moe.restore_s, label)

    if schedule.restores_first:
        restore(0)
    for place, layer in enumerate(layers):
        clocks.gathered_s += layer.gather_s
        if layer.gather_s > 0:
            clocks.wait("data_parallel", clocks.gathered_s)
        _dense(clocks, layer, 0)
        if layer.moe is None:
            continue
        number = with_experts.index(place)
        _gate(clocks, layer.moe)
        changed_s = 0.0
        if schedule.restores_last and not schedule.restores_first:
            restore(number)  # its layout is known only now
        if layer.moe.change_s is not None:
            changed_s = clocks.exchange(PARAMETERS, layer.moe.change_s, f"change {layer.name}")
        _tokens(clocks, layer.moe, f"dispatch {layer.name}")
        restore(number)  # if no rule has started it
        if schedule.restores_next:
            restore(number + 1)
        ready_s = max(restored_s.get(number, 0.0), changed_s)
        clocks.wait("restore", ready_s, f"wait: restore {layer.name}")
        clocks.work("experts", layer.moe.forward_N, "compute", f"experts {layer.name}")
        _tokens(clocks, layer.moe, f"combine {layer.name}")


def backward(clocks: Clocks, layers: Sequence[LayerTimes], schedule: Schedule) -> None:
    with_experts = [place for place, layer in enumerate(layers) if layer.moe is not None]
    restored_s: dict[int, float] = {}
    reducing: tuple[float, str] | None = None

    def restore(number: int) -> None:
        if number not in range(len(with_experts)) or number in restored_s:
            return
        layer = layers[with_experts[number]]
        assert layer.moe is not None
        if layer.moe.backward_restore_s is not None:
            label = f"restore {layer.name}"
            restored_s[number] = clocks.exchange(PARAMETERS, layer.moe.backward_restore_s, label)

    def await_reduce() -> None:
        nonlocal reducing
        if reducing is not None:
            clocks.wait("reduce", reducing[0], f"wait: reduce {reducing[1]}")
            reducing = None

    if schedule.restores_last:
        restore(len(with_experts) - 1)
    for place in reversed(range(len(layers))):
        layer = layers[place]
        moe = layer.moe
        if layer.again:
            _dense(clocks, layer, 0, label="again")
        if moe is not None:
            number = with_experts.index(place)
            if layer.again:
                _tokens(clocks, moe, f"dispatch {layer.name}, again")
                restore(number)
                ready_s = restored_s.get(number, 0.0)
                clocks.wait("restore", ready_s, f"wait: restore {layer.name}")
                clocks.work("experts", moe.forward_N, "compute", f"experts {layer.name}, again")
                _tokens(clocks, moe, f"combine {layer.name}, again")
            _tokens(clocks, moe, f"combine {layer.name}, backward")
            restore(number)
            if schedule.restores_previous:
                restore(number - 1)
            clocks.wait("restore", restored_s.get(number, 0.0), f"wait: restore {layer.name}")
            clocks.work("experts", moe.backward_N, "compute", f"experts {layer.name}, backward")
            _tokens(clocks, moe, f"dispatch {layer.name}, backward")
            await_reduce()
            if moe.reduce_s is not None:
                done_s = clocks.exchange(GRADIENTS, moe.reduce_s, f"reduce {layer.name}")
                reducing = done_s, layer.name
                if not schedule.delays_gradients:
                    await_reduce()
        _dense(clocks, layer, 1)
        if layer.again:
            await_reduce()  # before the checkpoint ends
        if layer.scatter_s > 0:
            begin_s = max(float(clocks.now_N.max()), clocks.scattered_s)
            clocks.scattered_s = begin_s + layer.scatter_s
    await_reduce()


def _dense(clocks: Clocks, layer: LayerTimes, direction: int, label: str = "") -> None:
    suffix = f", {label}" if label else ("", ", backward")[direction]
    clocks.work("attention", layer.attention_s[direction], "compute", f"dense layers{suffix}")
    clocks.work("dense", layer.dense_s[direction], "compute", f"dense layers{suffix}")
    clocks.work("tensor", layer.tensor_s[direction])
    clocks.work("host", layer.host_s)


def _gate(clocks: Clocks, moe: MoETimes) -> None:
    clocks.meet(moe.group)
    clocks.work("gate", moe.gate_s, "compute", "gate")


def _tokens(clocks: Clocks, moe: MoETimes, label: str) -> None:
    clocks.meet(moe.group, moe.within_node)
    clocks.work("tokens", moe.tokens_N, "tokens", label)
