"""Experts at home train as stock's modules, and only replicas are exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.traffic import reduce_traffic, restore_traffic
from tests.checkpoints import assert_equal
from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.rows import DIST_OPT
from tests.probes import running

HOMES = " --expert-parallel-mode fsep --fsep-sharding experts"
RANDOM = HOMES + " --fsep-planner random"


def command(data: str, extra: str, steps: int = 3, ranks: int = 2) -> list[str]:
    return command_line(data, extra, expert_parallel=ranks, global_batch=8, steps=steps)


def exchanges(model: Any) -> tuple[int, int, int]:

    coordinator = running()
    exchange = coordinator.streams.exchange
    memory = coordinator.streams.weights.num_bytes + coordinator.streams.grads.num_bytes
    return exchange.restored.collectives, exchange.reduced.collectives, memory


def test_a_run_without_replicas_is_stock_bit_for_bit(ranks: RankPools, text_data: str) -> None:
    stock: Record = ranks(2).run(train, command(text_data, DIST_OPT))[0]
    static = HOMES + " --fsep-planner static" + DIST_OPT
    homes: Record = ranks(2).run(train, command(text_data, static), exchanges)[0]
    assert identical(homes, stock)
    assert homes.probes == [(0, 0, 0)] * 3, "neither collectives nor memory"


def exchanged_and_expected(_: object) -> tuple[list[int], list[int], int]:
    """Return what was exchanged so far, what this step's layouts need, and matrices in memory.

    Frozen matrices are restored only.

    Numbers of restores and reduces, then the bytes that this rank received by each.
    """

    coordinator = running()
    streams, geometry = coordinator.streams, coordinator.geometry
    expected, rank = [0] * 4, coordinator.groups.rank
    for layer in coordinator.layers:
        layout = coordinator.pass_layouts.layout_for(layer.next_pass(training=True))
        fetches = int(any(expert != EMPTY for expert in replicas_of(layout, geometry.home_slots)))
        share = layer.share
        sizes = [*zip(share.rows, share.columns, strict=True)]
        trained = [sizes[at] for at in share.trained_at]
        of = Placed(layout, geometry)
        received = [
            int(traffic(of, moved, ExchangeAlgorithm.FLAT).intra_N[rank])
            for traffic, moved in ((restore_traffic, sizes), (reduce_traffic, trained))
        ]
        # Weights in bfloat16, and the step's sums in float32.
        of_layer = [fetches, fetches, 2 * received[0], 4 * received[1]]
        expected = [sum(pair) for pair in zip(expected, of_layer, strict=True)]
    exchange = streams.exchange
    counted = [exchange.count.restores, exchange.count.reduces]
    counted += [exchange.restored.received_bytes, exchange.reduced.received_bytes]
    return counted, expected, streams.weights.in_use


def replicas_of(layout: ExpertLayout, home_slots: int) -> list[int]:
    ranks = range(layout.num_ranks)
    return [expert for rank in ranks for expert in layout.experts_of(rank)[home_slots:]]


def test_replicas_are_held_and_their_gradients_summed_over_a_step(
    ranks: RankPools, text_data: str
) -> None:
    flags = RANDOM + " --fsep-restore step --fsep-set restore_algorithm=flat --bf16"
    flags += " --micro-batch-size 1"  # four in a step
    for record in ranks(2).run(train, command(text_data, flags, steps=6), exchanged_and_expected):
        before = [0] * 4
        for counted, expected, in_memory in record.probes:
            assert [now - then for now, then in zip(counted, before, strict=True)] == expected
            assert in_memory == 2 * expected[0], "both matrices of each layer with replicas"
            before = counted
        assert before[0] >= 4 and min(before) > 0


def test_stocks_optimizer_buffers_are_read_in_their_memory_layout(
    ranks: RankPools, text_data: str, tmp_path: Path
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


def sharding_in_force(_: object) -> str | None:
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    return None if coordinator is None else coordinator.geometry.sharding.value


def test_auto_takes_the_checkpoints_sharding(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    """In `dp_reshardable` no other sharding could read the optimizer's state."""
    auto = " --expert-parallel-mode fsep --use-distributed-optimizer --ckpt-format torch_dist"
    rows = auto + f" --fsep-planner laer --save {tmp_path} --save-interval 2"
    ranks(2).run(train, command(text_data, rows, steps=2))
    # Anew, this planner would have experts at home.
    auto += f" --load {tmp_path} --override-opt_param-scheduler"
    found = ranks(2).run(train, command(text_data, auto, steps=4), sharding_in_force)
    assert found[0].probes == ["rows"] * 2
