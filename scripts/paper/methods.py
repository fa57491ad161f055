"""The paper's methods, for `simulate`: FSDP+EP, LAER and FlexMoE, next to stock and FSEP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

from benchmarks.flexmoe import FLEXMOE, FlexMoEStrategy
from benchmarks.simulated import simulated as by_command
from megatron_laer.choices import ExchangeAlgorithm, FixedPlanner, PlanMode, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.planner.token_prices import BY_RANK
from megatron_laer.tools.simulator.iteration.methods import METHODS, Method, MethodSettings, relaid
from megatron_laer.tools.simulator.iteration.rates import Rates

FSDP_EP, LAER = "fsdp+ep", "laer"


def simulated(words: Sequence[str], *, ranges: bool = True) -> dict[str, Any]:
    """Return the JSON of `simulate`, which has the paper's methods too."""
    with mock.patch.dict(METHODS, {FSDP_EP: _fsdp, LAER: _laer, FLEXMOE: _flexmoe}):
        return by_command(words, ranges=ranges)


def _fsdp(settings: MethodSettings, rates: Rates) -> Method:
    """Make the paper's engine with a layout that never changes."""
    geometry = settings.geometry
    num_ranks, num_experts = geometry.num_ranks, geometry.num_experts
    # Experts per rank: as many as FSEP has slots, or the next smaller number that fits.
    fits = [
        each
        for each in range(geometry.capacity, 0, -1)
        if num_experts % each == 0 and num_ranks % (num_experts // each) == 0
    ]
    if not fits:
        raise ValueError(
            f"FSDP+EP needs E/C groups of ranks; {num_experts} experts on {num_ranks} ranks with "
            f"up to {geometry.capacity} each have none"
        )
    settings = replace(settings, geometry=replace(geometry, capacity=fits[0]))
    return _planned(FSDP_EP, FixedPlanner.STATIC, settings, rates)


def _laer(settings: MethodSettings, rates: Rates) -> Method:
    return _planned(LAER, LAER, settings, rates)


def _flexmoe(settings: MethodSettings, rates: Rates) -> Method:
    settings = _settings(settings)
    return relaid(FLEXMOE, settings, rates, FlexMoEStrategy(settings.geometry))


def _planned(name: str, planner: str, settings: MethodSettings, rates: Rates) -> Method:
    settings = _settings(settings)
    strategy = make_strategy(planner, geometry=settings.geometry, costs=settings.costs)
    return relaid(name, settings, rates, strategy)


def _settings(of: MethodSettings) -> MethodSettings:
    """Return FSEP's settings with rows, flat exchanges and layouts of earlier counts alone."""
    costs = replace(
        of.costs, restore_algorithm=ExchangeAlgorithm.FLAT, by_layout=False, tokens=BY_RANK
    )
    config = FSEPConfig(plan_mode=PlanMode.FORECAST, scheduler=of.config.scheduler)
    geometry = replace(of.geometry, sharding=Sharding.ROWS)
    return replace(of, geometry=geometry, costs=costs, config=config)
