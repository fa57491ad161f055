"""`simulate` counts the bytes that replicas in fp8 receive in training, by the flags of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_laer.choices import ExchangeAlgorithm, Fp8Recipe, Recompute, Sharding
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.tools.model_flags import fp8_recipe
from megatron_laer.tools.simulator.iteration.case_inputs import planner_costs
from megatron_laer.tools.simulator.iteration.methods import FSEP, MethodSettings, make_method
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.routing import Routing
from tests.parity.flags import command_line
from tests.parity.replay import train_row
from tests.tools.plan_cases import drifting_trace

EXPERTS, CAPACITY, HIDDEN, FFN = 8, 6, 48, 64
# Exchanges of a layer that are watched: one for each matrix.
MATRICES = 2
FSEP_FLAGS = (
    f" --bf16 --expert-parallel-mode fsep --fsep-allow-unproven fp8-experts --fsep-planner random"
    f" --fsep-capacity {CAPACITY} --fsep-scheduler off --fsep-restore-algorithm flat"
)


def counted(flags: list[str]) -> dict[str, Any]:
    """Train; return received bytes, the exchanged layouts as slots, and the run's own prices."""
    from unittest import mock

    from megatron_laer import session
    from megatron_laer.runtime.comm.home_exchange import DirectExchange

    found: dict[str, Any] = {"restore": [], "reduce": []}

    def watched(name: str) -> Any:
        steps = getattr(DirectExchange, f"{name}_steps")

        def exchange(self: Any, source: Any, index: Any, *args: Any, **options: Any) -> Any:
            found[name].append(index.layout.to_list())
            found["count"] = self.count
            found["costs"] = session.current_coordinator().guard.costs
            return steps(self, source, index, *args, **options)

        return mock.patch.object(DirectExchange, f"{name}_steps", exchange)

    with watched("restore"), watched("reduce"):
        train_row(flags)
    count = found.pop("count")
    return found | {"restored": count.restore_bytes, "reduced": count.reduce_bytes}


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_bytes_of_a_run_in_fp8_are_those_that_are_simulated(
    recipe: str, ranks: RankPools, text_data: str
) -> None:
    flags = f"{FSEP_FLAGS} --fp8-format hybrid --fp8-recipe {recipe}"
    by_rank = ranks(2).run(counted, command_line(text_data, flags, global_batch=8, steps=2))

    sizes = {"hidden": HIDDEN, "expert_ffn": FFN, "bytes_per_element": 2}
    model = replace(read_model("tiny-moe"), **sizes, fp8=fp8_recipe("hybrid", recipe))
    rates = Rates(replace(load_cluster("h100-8"), spreads=()), 2, fp8=True)
    geometry = Geometry(2, EXPERTS, CAPACITY, 2, Sharding.EXPERTS)
    costs = planner_costs(model, rates, Recompute.NONE, Routing(drifting_trace(), 4))
    costs = replace(costs, restore_algorithm=ExchangeAlgorithm.FLAT)
    planner: Any = make_method(FSEP, MethodSettings(geometry, costs), rates).layer_planner()

    def simulated(kind: int, layouts: list[list[int]]) -> float:
        """Return the mean bytes that a rank receives."""
        received = 0.0
        for slots in layouts:
            layout = ExpertLayout.from_slots(2, CAPACITY, EXPERTS, np.array(slots))
            exchange = planner._exchanges(layout)[kind]
            received += 0.0 if exchange is None else exchange.mean_intra_bytes / MATRICES
        return received

    for kind, (name, total) in enumerate((("restore", "restored"), ("reduce", "reduced"))):
        received = sum(found[total] for found in by_rank) / len(by_rank)
        assert received == pytest.approx(simulated(kind, by_rank[0][name]), abs=0.5) and received
    of_run = by_rank[0]["costs"]
    assert of_run.fp8 == Fp8Recipe(recipe)
    assert of_run.weights_form(geometry.home_slots) == costs.weights_form(geometry.home_slots)
