"""Experts at home train as stock's modules, and only replicas are exchanged."""

from __future__ import annotations

from megatron_laer.choices import ExchangeAlgorithm
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.traffic import reduce_traffic, restore_traffic
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.rows import DIST_OPT
from tests.probes import running

HOMES = " --expert-parallel-mode fsep --fsep-sharding experts"
RANDOM = HOMES + " --fsep-planner random"


def exchanges(_: object) -> tuple[int, int, int]:
    coordinator = running()
    exchange = coordinator.streams.exchange
    memory = coordinator.streams.weights.num_bytes + coordinator.streams.grads.num_bytes
    return exchange.restored.collectives, exchange.reduced.collectives, memory


def test_a_run_without_replicas_is_stock_bit_for_bit(trained: Trainings) -> None:
    stock = trained(DIST_OPT)
    homes = trained(HOMES + " --fsep-planner static" + DIST_OPT, exchanges)
    assert identical(homes, stock)
    assert homes.probes == [(0, 0, 0)] * 3, "neither collectives nor memory"


def exchanged_and_expected(_: object) -> tuple[list[int], list[int], int]:
    """Return what was exchanged so far, what this step's layouts need, and buffers in memory.

    Exchanged are numbers of restores and reduces, then the bytes that this rank received by each.
    Frozen matrices are restored only.
    """
    coordinator = running()
    streams, geometry = coordinator.streams, coordinator.geometry
    expected, rank = [0] * 4, coordinator.groups.rank
    for layer in coordinator.layers:
        layout = coordinator.pass_layouts.layout_for(layer.next_pass(training=True))
        fetches = int(any(expert != EMPTY for expert in replicas_of(layout, geometry.home_slots)))
        sizes = layer.share.sizes
        trained = [sizes[at] for at in layer.share.trained_at]
        of, way = Placed(layout, geometry), way_of(geometry, ExchangeAlgorithm.FLAT)
        received = [
            int(traffic(of, moved, way).intra_N[rank])
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


def test_replicas_are_held_and_their_gradients_summed_over_a_step(trained: Trainings) -> None:
    flags = RANDOM + " --fsep-restore step --fsep-set restore_algorithm=flat --bf16"
    flags += " --micro-batch-size 1"  # four in a step
    for record in trained.each(flags, exchanged_and_expected, steps=6):
        check_exchanged(record.probes)


def check_exchanged(steps: list[tuple[list[int], list[int], int]]) -> None:
    before = [0] * 4
    for counted, expected, in_memory in steps:
        assert [now - then for now, then in zip(counted, before, strict=True)] == expected
        assert in_memory == expected[0], "one buffer of each layer with replicas"
        before = counted
    assert before[0] >= 4 and min(before) > 0
