"""`simulate` counts the bytes that replicas in fp8 receive in training, by the flags of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_laer.choices import ExchangeAlgorithm, Recompute, Sharding
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.precision import Precision
from megatron_laer.tools.model_flags import precision_of
from megatron_laer.tools.simulator.iteration.link_bytes import link_bytes
from megatron_laer.tools.simulator.iteration.methods import FSEP, MethodSettings, make_method
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.simulator.iteration.run_shape import RunShape
from megatron_laer.tools.simulator.iteration.work import LayerWork
from tests.parity.flags import command_line
from tests.parity.replay import train_row
from tests.tools.plan_cases import drifting_trace

EXPERTS, CAPACITY, HIDDEN, FFN = 8, 6, 64, 64
# Exchanges of a layer that are watched: one for each matrix.
MATRICES = 2
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
    import weakref
    from unittest import mock

    from megatron_laer import session
    from megatron_laer.layer.experts.fp8.payload import PayloadForm
    from megatron_laer.planner.guard import Guard
    from megatron_laer.runtime.comm.exchange import Exchange

    found: dict[str, Any] = {"restore": [], "reduce": [], "decided": []}
    decide = Guard.decide

    def watched_decide(self: Guard, *args: Any) -> Any:
        found["decided"].append(self.costs.precision.is_quantised)
        return decide(self, *args)

    pack, held = PayloadForm.pack, {"now": 0, "most": 0}

    def watched_pack(*args: Any) -> Any:
        payload = pack(*args)
        hold(payload.nbytes)
        weakref.finalize(payload, hold, -payload.nbytes)
        return payload

    def hold(more: int) -> None:
        held["now"] += more
        held["most"] = max(held.values())

    def watched(name: str) -> Any:
        steps = getattr(Exchange, f"{name}_steps")

        def exchange(self: Any, source: Any, index: Any, *args: Any, **options: Any) -> Any:
            found[name].append((index.placed.quantised, index.placed.layout.to_list()))
            found["count"] = self.count
            found["costs"] = session.current_coordinator().guard.costs
            return steps(self, source, index, *args, **options)

        return mock.patch.object(Exchange, f"{name}_steps", exchange)

    packs = mock.patch.object(PayloadForm, "pack", watched_pack)
    decides = mock.patch.object(Guard, "decide", watched_decide)
    with watched("restore"), watched("reduce"), packs, decides:
        train_row(flags)
    count = found.pop("count")
    assert held["now"] == 0  # none outlives its exchange
    found["payloads"] = held["most"]
    return found | {"restored": count.restore_bytes, "reduced": count.reduce_bytes}


KINDS = {"plain": "", "recompute": RECOMPUTE, "held": HELD, "in bf16": IN_BF16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_bytes_of_a_run_in_fp8_are_those_that_are_simulated(
    recipe: str, kind: str, ranks: RankPools, text_data: str
) -> None:
    extra = KINDS[kind]
    flags = f"{FSEP_FLAGS} --fp8-format hybrid --fp8-recipe {recipe}{extra}"
    by_rank = ranks(2).run(counted, command_line(text_data, flags, global_batch=8, steps=2))
    # A reduce for each pass of a microbatch through a layer, or of a step.
    in_fp8, layouts = zip(*sorted(by_rank[0]["reduce"][::MATRICES]), strict=True)

    of_model = {"hidden": HIDDEN, "expert_ffn": FFN, "bytes_per_element": 2}
    of_model |= {"layer_has_experts": (True,) * len(layouts)}
    of_model |= {"bf16_ends": (in_fp8.count(False), 0)}
    model = replace(read_model("tiny-moe"), **of_model, precision=precision_of("hybrid", recipe))
    rates = Rates(replace(load_cluster("h100-8"), spreads=()), 2, precision=model.precision)
    geometry = Geometry(2, EXPERTS, CAPACITY, 2, Sharding.EXPERTS)
    recompute = Recompute.FULL if extra == RECOMPUTE else Recompute.NONE
    costs = model.costs(rates.cluster, recompute, Routing(drifting_trace(), 4).pairs)
    costs = replace(costs, restore_algorithm=ExchangeAlgorithm.FLAT)
    method = make_method(FSEP, MethodSettings(geometry, costs, holds_step=extra == HELD), rates)
    planner: Any = method.layer_planner()
    assert method.in_bf16 is not None
    in_bf16: Any = method.in_bf16.layer_planner()
    one = planner.work(np.ones((2, EXPERTS), dtype=np.int64))

    def work(layer: int, microbatch: int) -> LayerWork:
        slots = np.array(layouts[layer])
        layout = ExpertLayout.from_slots(2, CAPACITY, EXPERTS, slots)
        restore, reduce = (planner if in_fp8[layer] else in_bf16)._exchanges(layout)
        return replace(one, restore=restore, reduce=reduce)

    simulated = link_bytes(method, model, RunShape(2, 2, 64, 1, recompute=recompute), work)
    for name, total in (("restore", "restored"), ("reduce", "reduced")):
        received = sum(found[total] for found in by_rank) / len(by_rank)
        assert received == pytest.approx(simulated["intra"][name], abs=0.5) and received
    # Random layouts fill slots of other ranks with as many experts of a home as they can have.
    assert [found["payloads"] for found in by_rank] == [method.fixed_bytes["payloads"]] * 2
    of_run = by_rank[0]["costs"]
    assert (of_run.precision, of_run.recompute) == (Precision(recipe), recompute)
    form = of_run.weights_form(geometry.sharding)
    assert form == costs.weights_form(geometry.sharding)
    decided = [*by_rank[0]["decided"]]
    assert decided.count(False) == (len(decided) // 2 if extra == IN_BF16 else 0)
    if extra != HELD:  # its prices are those of microbatches
        moved = [
            [of_layer for of_layer, _ in by_rank[0][name]].count(True)
            for name in ("restore", "reduce")
        ]
        assert moved[0] / moved[1] == 1 + of_run.backward_restores(geometry.sharding)
