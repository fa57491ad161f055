"""What a rank pays: 1/N of the experts' state, and restored weights only while they are used."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from tests.parity.flags import command_line
from tests.parity.training import train
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

FSEP = " --expert-parallel-mode fsep --fsep-planner random"


def expert_state_bytes(command: list[str]) -> tuple[int, int]:
    """Bytes of this rank's expert weights, main gradients and optimizer state; elements of all."""
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
    ranks: Callable[[int], RankPool], text_data: str, size: int, flags: str, element_bytes: int
) -> None:
    command = command_line(
        text_data,
        experts=8,
        expert_parallel=size,
        global_batch=2 * size,
        steps=2,
        extra=FSEP + flags,
    )
    for mine_bytes, elements in ranks(size).run(expert_state_bytes, command):
        assert mine_bytes * size == elements * element_bytes


class RestoredStorage:
    """Counts restored matrices whose storage is alive, whoever holds it, autograd's C++ included.

    Each restored tensor is put on memory of a NumPy array, which dies with the tensor's storage.
    """

    def __init__(self) -> None:
        self.alive = 0
        self.most = 0

    def watch(self, restored: torch.Tensor) -> torch.Tensor:
        array = restored.numpy().copy()
        self.alive += 1
        self.most = max(self.most, self.alive)
        watched = torch.from_numpy(array)
        weakref.finalize(array, self._died)
        return watched

    def _died(self) -> None:
        self.alive -= 1


def live_restored_matrices(command: list[str]) -> tuple[list[int], list[int], int]:
    """Restored matrices alive after each chunk's forward, after each step, and at most."""
    from megatron.core.models.gpt import GPTModel

    from megatron_laer.runtime.restore import FlatExchange

    storage = RestoredStorage()
    restore, forward = FlatExchange.restore, GPTModel.forward
    after_forward: list[int] = []
    after_step: list[int] = []

    def observed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        after_forward.append(storage.alive)
        return output

    with (
        mock.patch.object(FlatExchange, "restore", lambda *args: storage.watch(restore(*args))),
        mock.patch.object(GPTModel, "forward", observed_forward),
    ):
        train(command, lambda model: after_step.append(storage.alive))
    return after_forward, after_step, storage.most


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
    ranks: Callable[[int], RankPool], text_data: str, recompute: str
) -> None:
    command = command_line(
        text_data,
        experts=8,
        expert_parallel=2,
        global_batch=8,
        steps=4,
        extra=FSEP + recompute + " --num-layers 3",
    )
    for after_forward, after_step, most in ranks(2).run(live_restored_matrices, command):
        assert len(after_forward) == 8 and len(after_step) == 4
        assert set(after_forward) == {0}, "weights restored in forward are held for backward"
        assert set(after_step) == {0}
        assert most == 2, "one layer's two matrices at a time"


def exchange_counts_of(command: list[str]) -> tuple[int, int, int, int, int]:
    """Restores, reduces, and bytes received for each, after a run; and bytes of the slots."""
    from megatron_laer.runtime.coordinator import current_coordinator

    found: list[tuple[int, int, int, int, int]] = []

    def read(model: list[torch.nn.Module]) -> None:
        coordinator = current_coordinator()
        assert coordinator is not None
        count = coordinator.exchange.count
        (specs, *_) = [
            module.specs
            for chunk in model
            for module in chunk.modules()
            if hasattr(module, "specs")
        ]
        expert_bytes = sum(4 * spec.rows * spec.columns for spec in specs)
        found.append(
            (
                count.restores,
                count.reduces,
                count.restore_bytes,
                count.reduce_bytes,
                coordinator.geometry.capacity * expert_bytes,
            )
        )

    train(command, read)
    return found[-1]


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_on_the_wire_follow_the_formula(
    ranks: Callable[[int], RankPool], text_data: str, size: int
) -> None:
    command = command_line(
        text_data, experts=8, expert_parallel=size, global_batch=4 * size, steps=3, extra=FSEP
    )
    passes = 3 * 2 * 2  # steps, microbatches, layers
    for restores, reduces, restored, reduced, slots in ranks(size).run(exchange_counts_of, command):
        assert restores == 2 * passes
        assert reduces == passes
        # C experts of P parameters, but for the 1/N of each that is here: C·P·(N-1)/N.
        assert restored * size == restores * slots * (size - 1)
        assert reduced * size == reduces * slots * (size - 1)
