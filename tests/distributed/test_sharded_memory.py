"""Bytes of a rank whose dense layers Megatron-FSDP shards, measured and by the formula."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from megatron_laer.planner.state_bytes import RankWeights, StateBytes, state_bytes
from megatron_laer.support.megatron_fsdp import STRATEGIES
from tests.parity.flags import command_line
from tests.parity.rows import DIST_OPT, FSDP

# By default Megatron-FSDP has gradients in the parameters' dtype.
HOMES = " --bf16 --megatron-fsdp-main-grads-dtype fp32 --expert-parallel-mode fsep --fsep-sharding"
HOMES += " experts --fsep-planner random"


def measured_bytes(command: list[str]) -> tuple[RankWeights, StateBytes]:
    """Return this rank's numbers of weights before sharding, and its bytes after a step."""
    from megatron.training import training

    from megatron_laer.plugin.sharded_models import is_sharded, unwrapped

    setup, kept = training.setup_model_and_optimizer, list[Any]()
    counts, found = list[RankWeights](), list[StateBytes]()

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        kept[:] = [result[1]]
        return result

    def count(chunk: torch.nn.Module) -> None:
        sizes = {name: part.numel() for name, part in chunk.named_parameters()}
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        layers = sum(size for name, size in sizes.items() if "layers." in name) - experts
        counts.append(RankWeights(layers, sum(sizes.values()) - layers - experts, experts))

    def measure(model: list[Any]) -> None:
        (chunk,), optimizer = model, kept[0]
        if is_sharded(chunk):
            chunk.synchronize_param_gather()  # frees layers that are gathered for the next step
            groups = chunk.param_and_grad_buffer.parameter_groups
            parts = [part for group in groups for part in group.params]
            weights = [*parts, *(group.model_weight_buffer.data for group in groups)]
            gradients = [group.main_grad_buffer.data for group in groups]
        else:
            parts = weights = list(unwrapped(chunk).parameters())
            gradients = [part.main_grad for part in parts]
        states = list[torch.Tensor]()
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            for main, state in one.optimizer.state.items():
                tensors = [main, *state.values()]
                states += [getattr(part, "_local_tensor", part) for part in tensors if part.dim()]
        found.append(StateBytes(*map(_bytes, (weights, gradients, states))))

    with mock.patch.object(training, "setup_model_and_optimizer", keep):
        train(command, measure, adapt=count, gradients=False)
    return counts[0], found[-1]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
@pytest.mark.parametrize(("size", "group"), [(2, 2), (4, 2)])
def test_a_ranks_bytes_are_those_of_the_formula(
    ranks: RankPools, text_data: str, strategy: str | None, size: int, group: int
) -> None:
    flags = DIST_OPT if strategy is None else FSDP + strategy
    command = command_line(
        text_data, flags + HOMES, steps=1, expert_parallel=group, global_batch=2 * size
    )
    results = ranks(size).run(measured_bytes, command)
    of = results[0][0]
    expected = state_bytes(of, strategy, ranks=size, expert_ranks=size // group, bytes_per_weight=2)
    print(f"\n{strategy} on {size} ranks, {of}\n  formula  {expected}")
    for _, found in results:
        print(f"  measured {found}")
    # A shard has whole rows, so that some ranks have fewer; buckets are padded.
    for part, mean in enumerate(expected):
        sizes = [found[part] for _, found in results]
        assert sum(sizes) / size == pytest.approx(mean, rel=0.005)
