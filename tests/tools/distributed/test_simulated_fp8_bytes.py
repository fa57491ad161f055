"""Prices have the bytes that replicas in fp8 receive in training, by the flags of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_laer.choices import Recompute, Sharding
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.tools.model_flags import precision_of
from megatron_laer.tools.simulator.iteration.methods import MethodSettings, fsep
from megatron_laer.tools.simulator.iteration.rates import Rates
from tests.parity.flags import command_line
from tests.parity.replay import train_row

EXPERTS, CAPACITY, HIDDEN, FFN = 8, 6, 64, 64
# Exchanges of a layer that are watched: one for each matrix.
FSEP_FLAGS = (
    f" --bf16 --expert-parallel-mode fsep --fsep-allow-unproven fp8-experts --fsep-planner random"
    f" --fsep-capacity {CAPACITY} --fsep-set scheduler=off restore_algorithm=flat"
    f" --hidden-size {HIDDEN}"
)
RECOMPUTE = " --recompute-granularity selective --recompute-modules moe"
HELD = " --fsep-restore step --fsep-plan-mode forecast"
# The first of two layers.
IN_BF16 = " --first-last-layers-bf16 --num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 0"


def counted(flags: list[str]) -> dict[str, Any]:
    """Train; return received bytes, layouts as slots, prices and most bytes of payloads at once.

    A layout has with it whether its layer is in fp8; so have the prices of decisions.
    """
    from unittest import mock

    from megatron_laer import session
    from megatron_laer.planner.guard import Guard
    from megatron_laer.runtime.comm.exchange import Exchange

    found: dict[str, Any] = {"restore": [], "reduce": [], "decided": []}
    decide = Guard.decide

    def watched_decide(self: Guard, *args: Any) -> Any:
        found["decided"].append(self.costs.precision.is_quantised)
        return decide(self, *args)

    def watched(name: str) -> Any:
        steps = getattr(Exchange, f"{name}_steps")

        def exchange(self: Any, source: Any, index: Any, *args: Any, **options: Any) -> Any:
            found[name].append((index.placed.quantised, index.placed.layout.to_list()))
            coordinator = session.current_coordinator()
            found["exchange"], found["payloads"] = self, coordinator.streams.payloads
            found["costs"] = coordinator.guard.costs
            return steps(self, source, index, *args, **options)

        return mock.patch.object(Exchange, f"{name}_steps", exchange)

    decides = mock.patch.object(Guard, "decide", watched_decide)
    with watched("restore"), watched("reduce"), decides:
        train_row(flags)
    exchange, pool = found.pop("exchange"), found["payloads"]
    assert pool.in_use == 0  # none outlives its exchange
    found["payloads"] = pool.num_bytes
    received = exchange.restored.received_bytes, exchange.reduced.received_bytes
    return found | dict(zip(("restored", "reduced"), received, strict=True))


KINDS = {"plain": "", "recompute": RECOMPUTE, "held": HELD, "in bf16": IN_BF16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_bytes_of_a_run_in_fp8_are_those_that_are_priced(
    recipe: str, kind: str, ranks: RankPools, text_data: str
) -> None:
    extra = KINDS[kind]
    flags = f"{FSEP_FLAGS} --fp8-format hybrid --fp8-recipe {recipe}{extra}"
    by_rank = ranks(2).run(counted, command_line(text_data, flags, global_batch=8, steps=2))
    geometry = Geometry(2, EXPERTS, CAPACITY, 2, Sharding.EXPERTS)
    cluster = replace(load_cluster("h100-8"), spreads=())
    precision = precision_of("hybrid", recipe)
    recompute = Recompute.FULL if extra == RECOMPUTE else Recompute.NONE
    costs = CostModel(cluster, HIDDEN, FFN, True, 2, recompute, precision=precision)
    # Sums of a step travel in four bytes, gradients of a microbatch in two.
    for name, total, factor in (("restore", "restored", 1), ("reduce", "reduced", 2)):
        expected = 0.0
        for in_fp8, slots in by_rank[0][name]:
            of = costs if in_fp8 else costs.in_bf16
            layout = ExpertLayout.from_slots(2, CAPACITY, EXPERTS, np.array(slots))
            priced = of.restore_bytes if name == "restore" else of.reduce_bytes
            placed = Placed(layout, geometry)
            traffic = priced(placed, of.way_of(placed))
            expected += traffic.intra_N.mean() * (factor if extra == HELD else 1)
        received = sum(found[total] for found in by_rank) / len(by_rank)
        assert received == pytest.approx(expected, abs=0.5) and received
    method = fsep(MethodSettings(geometry, costs), Rates(cluster, 2))
    assert [found["payloads"] for found in by_rank] == [method.fixed_bytes["payloads"]] * 2
    of_run = by_rank[0]["costs"]
    assert (of_run.precision, of_run.recompute) == (precision, recompute)
    assert of_run.weights_form(geometry.sharding) == costs.weights_form(geometry.sharding)
    decided = [*by_rank[0]["decided"]]
    assert decided.count(False) == (len(decided) // 2 if extra == IN_BF16 else 0)
    if extra != HELD:  # its prices are those of microbatches
        moved = [
            [of_layer for of_layer, _ in by_rank[0][name]].count(True)
            for name in ("restore", "reduce")
        ]
        assert moved[0] / moved[1] == 1 + of_run.backward_restores(geometry.sharding)
