"""Restored weights are in memory only during their use, and buffers stay as they are.

With experts at home, the latter are those of replica slots.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.training import Record, train
from tests.distributed.conftest import Trainings
from tests.faults.injected import ROUTINGS, current_step, routed
from tests.parity.compare import identical
from tests.parity.row import AT_HOME, FSEP, HOMES
from tests.parity.rows import FULL_RECOMPUTE, MOE_RECOMPUTE, RANDOM
from tests.probes import running

# Buffers of direct exchanges grow with an expert's replicas.
RELAY = " --fsep-set restore_algorithm=node"


@dataclass
class Held:
    """Buffers of restored weights and of their gradients on one rank, over a run.

    Attributes:
        after_forward: layers whose restored matrices are in use after each forward.
        after_step: restored matrices and gradients in use after each step.
        buffer_bytes: of weights, of gradients, and of the exchanges' workspaces, after each step.
        layer_bytes: restored matrices of one layer, R·K elements for each slot that is restored.
        layers: MoE layers that the schedule restores at once, and whose gradients it keeps.
    """

    after_forward: list[int]
    after_step: list[tuple[int, int]]
    buffer_bytes: list[tuple[int, int, int]]
    layer_bytes: int
    layers: tuple[int, int]


def held_buffers(command: list[str]) -> tuple[Held, Record]:
    """Return the buffers of a run, and its record; the probe counts restores."""
    from megatron.core.models.gpt import GPTModel

    from megatron_laer.runtime.comm.buffers import Workspace
    from megatron_laer.schedule import Schedule

    held = Held([], [], [], 0, (0, 0))
    forward = GPTModel.forward

    def observed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        coordinator = running()
        held.after_forward.append(coordinator.streams.weights.in_use)
        return output

    def look(_: object) -> int:
        coordinator = running()
        streams = coordinator.streams
        held.after_step.append((streams.weights.in_use, streams.grads.in_use))
        spaces = sum(item.num_bytes for item in gc.get_objects() if isinstance(item, Workspace))
        held.buffer_bytes.append((streams.weights.num_bytes, streams.grads.num_bytes, spaces))
        share, geometry = coordinator.layers[0].share, coordinator.geometry
        held.layer_bytes = (geometry.capacity - geometry.home_slots) * sum(
            rows * columns * matrix[0].element_size()
            for (rows, columns), matrix in zip(share.sizes, share.matrices, strict=True)
        )
        schedule = Schedule.of(coordinator.kinds)
        layers = len(coordinator.layers)
        held.layers = (schedule.restored_layers(layers), schedule.gradient_layers(layers))
        return streams.exchange.count.restores

    with mock.patch.object(GPTModel, "forward", observed_forward):
        record = train(command, look)
    return held, record


VIRTUAL = " --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"


@pytest.mark.parametrize(
    ("size", "layers", "extra"),
    [(2, 3, " --fsep-set scheduler=off"), (4, 8, VIRTUAL + AT_HOME + RELAY)],
    ids=["off", "virtual pipeline 2 x 2, experts at home"],
)
def test_weights_that_fit_stay_until_backward_and_change_no_bit(
    trained: Trainings, size: int, layers: int, extra: str
) -> None:
    flags = f"{FSEP}{RANDOM}{extra} --fsep-capacity 8 --num-layers {layers}"
    plain, record = trained(flags, by=held_buffers, size=size)
    gib = 1.5 * plain.layer_bytes / 2**30  # of one layer, not of two
    keeping = f"{flags} --fsep-restore"
    held, same = trained(f"{keeping} {gib}", by=held_buffers, size=size)
    assert identical(same, record)
    assert record.probes[-1] - same.probes[-1] >= len(record.losses)
    for result in trained.ends(f"{keeping} {gib / 2}", by=held_buffers, size=size):
        assert f"--fsep-restore {gib / 2}: keeps no layer's" in result.message
    assert set(held.after_step) == {(0, 0)}
    most = plain.layers[0] + 1
    assert max(weights for weights, _, _ in held.buffer_bytes) <= most * plain.layer_bytes


NODES = " --expert-model-parallel-size 4 --fsep-node-size 2"
# Ranks and flags. Those that hold weights over a step are in `measured_memory.py`.
CASES = {
    "plain": (2, RANDOM),
    "off": (2, RANDOM + " --fsep-set scheduler=off"),
    "full recompute": (2, RANDOM + FULL_RECOMPUTE),
    "selective recompute": (2, RANDOM + MOE_RECOMPUTE),
    # With this number of slots every layout has replicas.
    "experts at home": (2, RANDOM + AT_HOME + RELAY + " --fsep-capacity 8"),
    "adaptive": (
        2,
        " --fsep-planner greedy --fsep-late-plan wait --fsep-set imbalance_tolerance=0.02",
    ),
    "pipeline": (4, f"{RANDOM} --pipeline-model-parallel-size 2 --num-layers 4"),
    "nodes": (4, f"{RANDOM}{NODES}{RELAY}"),
    "exact, experts at home by relay": (2, f" --fsep-plan-mode exact{HOMES}{RELAY}"),
}
# Weights in use after each forward are known in these.
KNOWN = ("plain", "off", "full recompute", "selective recompute", "experts at home")


@pytest.mark.parametrize("case", CASES)
def test_no_restored_weight_outlives_its_use_and_buffers_stay_as_they_are(
    trained: Trainings, case: str
) -> None:
    size, flags = CASES[case]
    options = {"size": size, "global_batch": 4 * size, "steps": 4}
    for held, _ in trained.each(f"{FSEP} --num-layers 3{flags}", by=held_buffers, **options):
        assert len(set(held.buffer_bytes)) == 1, "steady state allocates"
        weights, grads, _ = held.buffer_bytes[0]
        restored, arriving = held.layers
        assert weights == restored * held.layer_bytes
        # Under a checkpoint a layer's gradients arrive before its own backward ends.
        assert held.layer_bytes <= grads <= arriving * held.layer_bytes
        assert set(held.after_step) == {(0, 0)}
        if case not in KNOWN:
            continue
        # From the second step on, the last layer's matrices wait for the backward that follows.
        kept = 0 if case == "off" else 1
        assert len(held.after_forward) == 8 and held.after_forward[:2] == [0] * 2
        # At home a random layout may have no replica.
        assert kept in held.after_forward
        assert set(held.after_forward[2:]) <= ({0, kept} if AT_HOME in flags else {kept})
        assert held.layers == ((1, 1) if case == "off" else (2, 2))


def kept_activations(command: list[str]) -> tuple[int, int]:
    """Train; return the number of activation computations, and bytes kept after forward."""
    from megatron.core.models.gpt import GPTModel

    from megatron_laer.layer.experts.restored_compute import RestoredCompute

    computed: list[torch.Tensor] = []
    kept = 0
    activate, forward = RestoredCompute._activate, GPTModel.forward

    def observed_activation(self: Any, *args: Any) -> Any:
        output = activate(self, *args)
        computed.append(output.detach())
        return output

    def observed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal kept
        output = forward(self, *args, **kwargs)
        kept += sum(tensor.untyped_storage().nbytes() for tensor in computed)
        return output

    with (
        mock.patch.object(RestoredCompute, "_activate", observed_activation),
        mock.patch.object(GPTModel, "forward", observed_forward),
    ):
        train(command)
    return len(computed), kept


def test_a_recomputed_activation_is_not_kept(trained: Trainings) -> None:
    recompute = " --recompute-granularity selective --moe-grouped-gemm --recompute-modules"
    plain, under = (
        trained.each(f"{FSEP}{recompute} {modules}", by=kept_activations, global_batch=4, steps=1)
        for modules in ("core_attn", "moe_act")
    )
    for (computed, kept), (recomputed, left) in zip(plain, under, strict=True):
        assert kept > 0 and left == 0
        assert recomputed == 2 * computed > 0


def bytes_in_tensors(command: list[str], burst_every: int, look_every: int) -> list[int]:
    """Train; every so many steps all tokens go to one expert. Return bytes of live tensors."""
    found: list[int] = []
    one_expert = ROUTINGS["every token to one expert"]

    def burst(map_TE: torch.Tensor) -> torch.Tensor:
        return map_TE if current_step() % burst_every else one_expert(map_TE)

    def look(_: object) -> None:
        if (current_step() + 1) % look_every == 0:
            gc.collect()
            tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
            storages = {item.untyped_storage().data_ptr(): item for item in tensors}
            found.append(sum(item.untyped_storage().nbytes() for item in storages.values()))

    with routed(burst):
        train(command, look)
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("sharding", ["", HOMES], ids=["rows", "experts at home"])
def test_bursts_leave_no_memory_behind(trained: Trainings, sharding: str) -> None:
    flags = f"{FSEP} --fsep-late-plan wait{sharding} --lr 1e-4 --min-lr 1e-4"
    options: dict[str, Any] = {"steps": 400, "global_batch": 4, "timeout_s": 7200.0}
    for held in trained.each(flags, 10, 100, by=bytes_in_tensors, **options):
        # By step 200 the caches of index tensors hold all layouts of the run.
        assert len(held) == 4 and held[-1] < 1.01 * held[1], held
