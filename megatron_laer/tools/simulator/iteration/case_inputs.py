"""Routing and prices of one case, as `simulate` and `advise` predict it."""

from __future__ import annotations

from megatron_laer.choices import Recompute
from megatron_laer.planner.costs import CostModel
from megatron_laer.tools.simulator.iteration.model_shape import ModelShape
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.routing import Routing
from megatron_laer.tools.simulator.replay import check_memory, kept_forecasts
from megatron_laer.tools.traces.records import Trace


def case_routing(
    trace: Trace,
    model: ModelShape,
    num_ranks: int,
    tokens: int | None,
    lag: int,
    kind: type[Routing] = Routing,
) -> Routing:
    """Return the trace's routing on other ranks, and with other tokens of a rank if given."""
    check_memory(
        num_ranks,
        model.num_experts,
        record_bytes=0,
        forecasts=kept_forecasts(trace, lag),
        purpose=f"simulating {num_ranks:,} ranks",
    )
    return kind(trace, num_ranks, None if tokens is None else float(tokens * model.topk))


def tokens_of(routing: Routing, model: ModelShape) -> int:
    """Return the mean tokens of a rank and microbatch."""
    return max(round(routing.pairs / model.topk), 1)


def planner_costs(
    model: ModelShape, nominal: Rates, recompute: Recompute, routing: Routing
) -> CostModel:
    """Return the prices that the planner of a run has."""
    return CostModel(
        cluster=nominal.cluster,
        hidden=model.hidden,
        ffn=model.expert_ffn,
        gated=model.gated,
        bytes_per_element=model.bytes_per_element,
        recompute=recompute,
        pairs_per_rank=round(routing.pairs),
        fp8=model.fp8,
    )
