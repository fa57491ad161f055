"""Experts at home are stock's parameters: names, checkpoints, optimizer buffers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.cpu.ranks import RankPool
from megatron_laer.cpu.training import Record, train
from tests.checkpoints import assert_equal
from tests.parity.compare import identical
from tests.parity.flags import command_line

HOMES = " --expert-parallel-mode fsep --fsep-sharding experts"
RANDOM = HOMES + " --fsep-planner random"
DISTRIBUTED = " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


def command(data: str, extra: str, steps: int = 3, ranks: int = 2) -> list[str]:
    return command_line(
        data, experts=8, expert_parallel=ranks, global_batch=8, steps=steps, extra=extra
    )


def names_and_marks(model: list[Any]) -> list[Any]:
    """Describe each parameter of a wrapped model, and each key of its checkpoint."""
    from megatron.core.utils import unwrap_model

    marks = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride")
    (chunk,) = model
    parameters = [
        (name, tuple(part.shape), part.dtype, [getattr(part, mark, None) for mark in marks])
        for name, part in chunk.named_parameters()
    ]
    saved = unwrap_model(chunk).sharded_state_dict()
    return [parameters, sorted(chunk.state_dict()), sorted(map(str, saved))]


@pytest.mark.parametrize("flags", ["", " --disable-bias-linear"])
def test_names_shapes_and_marks_are_stocks(
    ranks: Callable[[int], RankPool], text_data: str, flags: str
) -> None:
    stock, homes = (
        ranks(2).run(train, command(text_data, mode + flags, steps=1), names_and_marks)
        for mode in ("", RANDOM)
    )
    for rank in range(2):
        assert stock[rank].probes and homes[rank].probes == stock[rank].probes


def exchanges(model: Any) -> tuple[int, int, int]:
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    assert coordinator is not None
    count = coordinator.streams.exchange.count
    memory = coordinator.streams.weights.num_bytes + coordinator.streams.grads.num_bytes
    return count.restore_collectives, count.reduce_collectives, memory


def test_a_run_without_replicas_is_stock_bit_for_bit(
    ranks: Callable[[int], RankPool], text_data: str
) -> None:
    stock: Record = ranks(2).run(train, command(text_data, DISTRIBUTED))[0]
    static = HOMES + " --fsep-planner static" + DISTRIBUTED
    homes: Record = ranks(2).run(train, command(text_data, static), exchanges)[0]
    assert identical(homes, stock)
    assert homes.probes == [(0, 0, 0)] * 3, "neither collectives nor memory"


def test_a_second_run_has_the_same_bits(ranks: Callable[[int], RankPool], text_data: str) -> None:
    first, second = (
        ranks(2).run(train, command(text_data, RANDOM + DISTRIBUTED + " --bf16"))[0]
        for _ in range(2)
    )
    assert identical(first, second)


def test_stocks_optimizer_buffers_are_read_in_their_memory_layout(
    ranks: Callable[[int], RankPool], text_data: str, tmp_path: Path
) -> None:
    """`dp_reshardable` is the form that rows cannot read from stock."""
    saved = " --use-distributed-optimizer --override-opt_param-scheduler"
    saved += " --ckpt-format torch_dist --save {} --save-interval 2"
    loaded = saved + " --load {}"
    there, back = tmp_path / "stock", tmp_path / "homes"
    stock = ranks(2).run(train, command(text_data, saved.format(there), steps=2))[0]
    again = HOMES + " --fsep-planner static" + loaded.format(back, there)
    homes = ranks(2).run(train, command(text_data, again, steps=4))[0]
    on = ranks(2).run(train, command(text_data, loaded.format(tmp_path / "on", there), steps=4))[0]
    assert len(stock.losses) == 2 and homes.losses == on.losses
    assert_equal(homes.weights, on.weights)
