"""Methods of training MoE layers, with their layouts, splits and exchanges.

FSEP has training's strategy, guard, exact split and schedule, stock the same rates and overlap.

Legend: N ranks, E experts, S slots, X ranks of an expert-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megatron_laer.arrays import Int64
from megatron_laer.choices import Dispatch, PlanMode, Restore, Split
from megatron_laer.config import FSEPConfig
from megatron_laer.life import Kind, Kinds, kinds_of
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.outcome import Outcome
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.strategies import Strategy, make_strategy
from megatron_laer.planner.token_exchange import with_token_exchange
from megatron_laer.planner.token_prices import TokenPrices
from megatron_laer.planner.traffic import Traffic
from megatron_laer.planner.wire_form import WireForm
from megatron_laer.schedule import Schedule
from megatron_laer.tools.simulator.iteration.buffers import SUM_BYTES, buffers, library_bytes
from megatron_laer.tools.simulator.iteration.rates import Rates
from megatron_laer.tools.simulator.iteration.work import (
    Exchange,
    LayerWork,
    TokenPassing,
    grouped_totals,
)
from megatron_laer.tools.simulator.replay import LayerPolicy, Observed, changed_traffic

STOCK, FSEP = "stock", "fsep"


@dataclass(frozen=True)
class MethodSettings:
    """Settings that methods are made from; `geometry` is of those that lay out experts.

    `stock_group` is X of stock; None for the largest possible. With `stock_flex` it has the flex
    dispatcher, unless a rank is alone. With `combined` all methods run Megatron's combined 1F1B.
    """

    geometry: Geometry
    costs: CostModel
    config: FSEPConfig = field(default_factory=FSEPConfig)
    stock_group: int | None = None
    topk: int = 1
    stock_flex: bool = False
    combined: bool = False

    @property
    def kinds(self) -> Kinds:
        return self.config.kinds | kinds_of({Kind.PARTS: self.combined})


@dataclass(frozen=True)
class Method:
    """Layouts, exchanges and memory of one method of training.

    With `one_stream` parameters and gradients share a communicator. `layer_planner` makes a planner
    of one layer. A rank owns `experts_held` experts' worth of weights in each layer, as do
    `replicas` ranks of an FSEP group. It restores `restored` whole ones, in another `form` than
    gradients' if it is given. `group` are the ranks of a group of stock, and `dispatcher` is its
    dispatcher. `fixed_bytes` are of libraries and buffers, by part, and do not depend on the run.
    """

    name: str
    schedule: Schedule
    one_stream: bool
    layer_planner: Callable[[], _Grouped | _Relaid]
    experts_held: float
    restored: int
    replicas: int
    group: int | None = None
    dispatcher: str | None = None
    fixed_bytes: Mapping[str, float] = field(default_factory=dict)
    form: WireForm | None = None


def stock(settings: MethodSettings, rates: Rates) -> Method:
    """Make Megatron's expert parallelism."""
    geometry = settings.geometry
    fits = math.gcd(geometry.num_ranks, geometry.num_experts)
    group = settings.stock_group or fits
    if fits % group != 0:
        raise ValueError(
            f"stock expert parallelism of size {group}: it must divide {geometry.num_ranks} ranks "
            f"and {geometry.num_experts} experts; use a divisor of {fits}"
        )
    each, is_flex = geometry.num_experts // group, settings.stock_flex and group > 1
    passing = TokenPassing(group, sorts_chunks=not is_flex)
    if is_flex:  # its buffers need a group
        passing = replace(passing, prices=_by_flex(settings, group))
    return Method(
        STOCK,
        Schedule.of(kinds_of({Kind.ALONE: True, Kind.PARTS: settings.combined})),
        one_stream=False,
        layer_planner=lambda: _Grouped(passing, geometry.node_size, rates),
        experts_held=each,
        restored=0,
        replicas=geometry.num_ranks // group,
        group=group,
        dispatcher="flex" if is_flex else "alltoall",
        fixed_bytes=library_bytes(rates.cluster.card, [(group, geometry.node_size)]),
    )


def _by_flex(settings: MethodSettings, group: int) -> TokenPrices:
    """Return the prices of tokens in a group of stock with the flex dispatcher."""
    experts, node_size = settings.geometry.num_experts, math.gcd(settings.geometry.node_size, group)
    placement = Geometry(group, experts, experts // group, node_size)
    costs, topk = settings.costs, settings.topk
    tokens = max((costs.pairs_per_rank or experts) // topk, 1)
    return with_token_exchange(costs, Dispatch.FLEX, placement, topk, tokens).tokens


def relaid(name: str, settings: MethodSettings, rates: Rates, strategy: Strategy) -> Method:
    """Make a method that lays out experts by a strategy: FSEP, or one of the paper's comparisons.

    The latter differ in their planner alone. They plan by the newest counts, split evenly, look no
    operation ahead, and parameters and gradients share a communicator.
    """
    geometry, costs, config = settings.geometry, settings.costs, settings.config
    is_ours = name == FSEP
    holds_step = config.restore == Restore.STEP
    guard = Guard(config.mode, costs, geometry, split=Split.EXACT if is_ours else Split.EVEN)

    def layer_planner() -> _Relaid:
        policy = LayerPolicy(strategy, geometry.static_layout, by_newest=not is_ours)
        return _Relaid(policy, guard, rates, holds_step)

    return Method(
        name,
        Schedule.of(settings.kinds | kinds_of({Kind.SYNCHRONISED: not is_ours})),
        one_stream=not is_ours,
        layer_planner=layer_planner,
        experts_held=geometry.num_experts / geometry.num_ranks,
        restored=geometry.replica_slots,
        replicas=1,
        fixed_bytes=buffers(geometry, costs, rates.cluster.card, holds_step=holds_step),
        form=costs.weights_form(geometry.sharding),
    )


def fsep(settings: MethodSettings, rates: Rates) -> Method:
    """Make ours, with the settings of training."""
    planner, costs = settings.config.planner, replace(settings.costs, kinds=settings.kinds)
    strategy = make_strategy(planner, geometry=settings.geometry, costs=costs)
    return relaid(FSEP, replace(settings, costs=costs), rates, strategy)


# Makers of methods, at the nominal rates; a comparison with another planner adds its own, by
# `relaid`, as `scripts/paper/methods.py` does.
METHODS: dict[str, Callable[[MethodSettings, Rates], Method]] = {STOCK: stock, FSEP: fsep}


@dataclass
class _Grouped:
    """Stock's placement in groups of X ranks."""

    passing: TokenPassing
    node_size: int
    rates: Rates

    def begin_step(self, observed: Observed) -> None:
        pass

    def work(self, counts_NE: Int64) -> LayerWork:
        assert self.passing.group is not None
        totals = grouped_totals(counts_NE, self.passing.group, self.node_size)
        return LayerWork.of(totals, self.rates, passing=self.passing, node_size=self.node_size)


@dataclass
class _Relaid:
    """Replay of one layer, whose outcomes have exchanges of weights and gradients.

    With `holds_step` gradients are sums of a step.
    """

    policy: LayerPolicy
    guard: Guard
    rates: Rates
    holds_step: bool = False
    exchanges: tuple[Exchange | None, Exchange | None] = field(init=False)

    def __post_init__(self) -> None:
        self.exchanges = self._exchanges(self.policy.layout)

    def begin_step(self, observed: Observed) -> None:
        """Plan the layout of a step; `exact` starts from the static one each time."""
        if self.guard.mode != PlanMode.EXACT:
            self.exchanges = self._exchanges(self.policy.plan(observed))

    def work(self, counts_NE: Int64) -> LayerWork:
        guard, costs = self.guard, self.guard.costs
        outcome = Outcome(guard.decide(counts_NE, self.policy.layout))
        decision = outcome.decision
        restore, reduce = self.exchanges
        change, solve_s = None, 0.0
        if decision.solved:
            solve_s = costs.solve_seconds(guard.geometry)
        if decision.replanned:
            restore, reduce = self._exchanges(decision.layout)
            if guard.mode != PlanMode.EXACT:
                traffic = changed_traffic(guard, decision)
                change = self._restore(traffic)
        passing = TokenPassing(prices=costs.tokens)
        node_size = guard.geometry.node_size
        sent = restore, reduce, change
        return LayerWork.of(outcome.totals, self.rates, *sent, solve_s, passing, node_size)

    def _exchanges(self, layout: ExpertLayout) -> tuple[Exchange | None, Exchange | None]:
        """Return restore and reduce; None where experts are at home and none has a replica."""
        costs, placed = self.guard.costs, Placed(layout, self.guard.geometry)
        if not placed.has_replicas:
            return None, None
        way = costs.way_of(placed)
        restore, reduce = costs.restore_bytes(placed, way), costs.reduce_bytes(placed, way)
        if self.holds_step:
            reduce = _summed(reduce, SUM_BYTES // costs.bytes_per_element)
        back = Exchange.of(reduce, costs.grads_form, placed.geometry)
        return self._restore(restore), back

    def _restore(self, traffic: Traffic) -> Exchange:
        geometry = self.guard.geometry
        form = self.guard.costs.weights_form(geometry.sharding)
        return Exchange.of(traffic, form, geometry)


def _summed(reduce: Traffic, factor: int) -> Traffic:
    """Return the bytes of gradients in the dtype of sums over a step.

    After the first hop rows have the weights' dtype, all between nodes. A relay's last hop does so
    inside nodes too, where its bytes count like the others.
    """
    whole = reduce.times(factor)
    if len(reduce.links) == 1:
        return whole
    return replace(whole, inter_N=reduce.inter_N, sent_inter_N=reduce.sent_inter_N)
