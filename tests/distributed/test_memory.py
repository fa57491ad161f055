"""Memory of a rank: 1/N of the experts' state, and restored weights only during their use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.parity.flags import command_line

RANDOM = " --fsep-planner random"
FSEP = " --expert-parallel-mode fsep --fsep-sharding rows" + RANDOM


def expert_state_bytes(command: list[str]) -> tuple[int, int]:
    """Return bytes of this rank's expert weights, main gradients and optimizer; all elements."""
    from megatron.training import training

    sizes: list[tuple[int, int]] = []
    setup = training.setup_model_and_optimizer
    kept: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        kept[:] = [result[1]]
        return result

    def measure(model: list[torch.nn.Module]) -> None:
        if sizes:
            return
        experts = [
            module for chunk in model for module in chunk.modules() if hasattr(module, "slices")
        ]
        parameters = [piece for module in experts for piece in module.slices()]
        states = {}
        for optimizer in kept[0].chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                for main in group["params"]:
                    states[main.data_ptr()] = (main, optimizer.optimizer.state[main])
        mine = 0
        for parameter in parameters:
            tensors = [parameter, parameter.main_grad]
            main = getattr(parameter, "main_param", None)
            main = parameter if main is None else main
            found, state = states[main.data_ptr()]
            tensors += [] if found is parameter else [found]
            tensors += [value for value in state.values() if value.dim() > 0]
            mine += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        whole = sum(
            spec.num_experts * spec.rows * spec.columns
            for module in experts
            for spec in module.specs
        )
        sizes.append((mine, whole))

    with mock.patch.object(training, "setup_model_and_optimizer", keep):
        train(command, measure)
    return sizes[0]


# Weight, main gradient, and Adam's two moments; under bf16 also the weight in fp32.
@pytest.mark.parametrize(
    ("size", "flags", "element_bytes"),
    [(2, "", 4 + 4 + 8), (4, "", 4 + 4 + 8), (2, " --bf16", 2 + 4 + 8 + 4)],
    ids=["2 ranks", "4 ranks", "bf16"],
)
def test_a_rank_holds_its_share_of_weights_gradients_and_optimizer_state(
    ranks: RankPools, text_data: str, size: int, flags: str, element_bytes: int
) -> None:
    command = command_line(
        text_data, FSEP + flags, expert_parallel=size, global_batch=2 * size, steps=2
    )
    for mine_bytes, elements in ranks(size).run(expert_state_bytes, command):
        assert mine_bytes * size == elements * element_bytes


@dataclass
class Held:
    """Buffers of restored weights and of their gradients on one rank, over a run.

    Attributes:
        after_forward: restored matrices in use after each chunk's forward.
        after_step: restored matrices and gradients in use after each step.
        buffer_bytes: of weights, of gradients, and of the exchanges' workspaces, after each step.
        layer_bytes: restored matrices of one layer, C·R·K elements each.
        layers: MoE layers that the schedule restores at once, and whose gradients it keeps.
    """

    after_forward: list[int]
    after_step: list[tuple[int, int]]
    buffer_bytes: list[tuple[int, int, int]]
    layer_bytes: int
    layers: tuple[int, int]


def held_buffers(command: list[str]) -> Held:
    from megatron.core.models.gpt import GPTModel

    from megatron_laer.session import current_coordinator

    held = Held([], [], [], 0, (0, 0))
    forward = GPTModel.forward

    def observed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        coordinator = current_coordinator()
        assert coordinator is not None
        held.after_forward.append(coordinator.streams.weights.in_use)
        return output

    def look(model: object) -> None:
        coordinator = current_coordinator()
        assert coordinator is not None
        streams, exchange = coordinator.streams, coordinator.streams.exchange
        held.after_step.append((streams.weights.in_use, streams.grads.in_use))
        spaces = exchange.restore_workspace.num_bytes + exchange.reduce_workspace.num_bytes
        held.buffer_bytes.append((streams.weights.num_bytes, streams.grads.num_bytes, spaces))
        slices = coordinator.layers[0].share
        held.layer_bytes = sum(
            coordinator.geometry.capacity * rows * slice_ErK.shape[2] * slice_ErK.element_size()
            for rows, slice_ErK in zip(slices.rows, slices.parameters, strict=True)
        )
        schedule = coordinator.scheduler.schedule
        layers = len(coordinator.layers)
        held.layers = (schedule.restored_layers(layers), schedule.gradient_layers(layers))

    with mock.patch.object(GPTModel, "forward", observed_forward):
        train(command, look)
    return held


@pytest.mark.parametrize("scheduler", ["on", "off"])
@pytest.mark.parametrize(
    "recompute",
    [
        "",
        " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        " --recompute-granularity selective --recompute-modules moe",
    ],
    ids=["no recompute", "full recompute", "selective recompute"],
)
def test_no_restored_weight_outlives_its_use(
    ranks: RankPools, text_data: str, recompute: str, scheduler: str
) -> None:
    command = command_line(
        text_data,
        f"{FSEP}{recompute} --num-layers 3 --fsep-scheduler {scheduler}",
        global_batch=8,
        steps=4,
    )
    for held in ranks(2).run(held_buffers, command):
        assert len(held.after_forward) == 8 and len(held.after_step) == 4
        assert set(held.after_forward) == {0}, "weights restored in forward are held for backward"
        assert set(held.after_step) == {(0, 0)}
        assert len(set(held.buffer_bytes)) == 1, "steady state allocates"
        weights, grads, _ = held.buffer_bytes[0]
        assert held.layers == ((2, 2) if scheduler == "on" else (1, 1))
        assert weights == held.layers[0] * held.layer_bytes
        # Under a checkpoint a layer's gradients arrive before its own backward ends.
        assert held.layer_bytes <= grads <= held.layers[1] * held.layer_bytes


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (2, f"{RANDOM} --fsep-restore step"),
        (2, " --fsep-planner greedy --fsep-late-plan wait --fsep-imbalance-tolerance 0.02"),
        (4, f"{RANDOM} --pipeline-model-parallel-size 2 --num-layers 4"),
        (
            4,
            f"{RANDOM} --expert-model-parallel-size 4 --fsep-node-size 2"
            " --fsep-restore-algorithm node",
        ),
    ],
    ids=["step", "adaptive", "pipeline", "nodes"],
)
def test_buffers_stay_as_they_are_after_the_first_step(
    ranks: RankPools, text_data: str, size: int, flags: str
) -> None:
    command = command_line(
        text_data,
        f" --expert-parallel-mode fsep --fsep-sharding rows --num-layers 3{flags}",
        global_batch=16,
        steps=6,
    )
    for held in ranks(size).run(held_buffers, command):
        assert len(set(held.buffer_bytes)) == 1, "steady state allocates"
        weights, grads, _ = held.buffer_bytes[0]
        restored, arriving = held.layers
        assert weights == restored * held.layer_bytes
        sums = (
            restored * held.layer_bytes if "restore step" in flags else 0
        )  # float32, like all other buffers
        assert held.layer_bytes <= grads - sums <= arriving * held.layer_bytes


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


def test_a_recomputed_activation_is_not_kept(ranks: RankPools, text_data: str) -> None:
    def run(flags: str) -> list[tuple[int, int]]:
        command = command_line(text_data, FSEP + flags, experts=4, steps=1)
        return ranks(2).run(kept_activations, command)

    recompute = " --recompute-granularity selective --moe-grouped-gemm --recompute-modules"
    for (computed, kept), (recomputed, left) in zip(
        run(f"{recompute} core_attn"), run(f"{recompute} moe_act"), strict=True
    ):
        assert kept > 0 and left == 0
        assert recomputed == 2 * computed > 0
