"""The guard is legal, agrees on all ranks, and never predicts worse than keeping the layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.arrays import Int64
from megatron_laer.choices import (
    Auto,
    Dispatch,
    ExchangeAlgorithm,
    PlanMode,
    Recompute,
    Sharding,
    Split,
)
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Card, HostTime, Link, SolveTime
from megatron_laer.planner.construct import always_balances, construct_layout
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.exact import exact_split
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.greedy import GreedyStrategy
from megatron_laer.planner.guard import GUARD_MODES, Decision, Guard, in_words
from megatron_laer.planner.home import replicate
from megatron_laer.planner.hops import way_of
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.token_prices import TokenPrices
from megatron_laer.precision import Precision
from tests.costs import COMPUTE_ONLY, FREE, make_costs
from tests.unit.planner_cases import KINDS, counts_of, geometries, home_geometries

HOSTS = (None, HostTime(3e-6, SolveTime(1e-5, 1e-7, 1e-8)))
# From almost free changes to changes that never pay.
SOLVES = (SolveTime(0.0, 0.0, 0.0), SolveTime(1e-6, 1e-8, 1e-9), SolveTime(1e-3, 0.0, 0.0))
NODE = TokenPrices(Dispatch.NODE, intra_rows=0.9, inter_rows=0.46)


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    return make_costs(
        points=draw(st.sampled_from([((1, 1e10),), ((1, 1e8), (16, 1e9), (256, 1e10))])),
        intra=draw(st.sampled_from([FREE, Link(3e11, 1e-7), Link(3e8, 1e-6)])),
        inter=draw(st.sampled_from([FREE, Link(1e9, 1e-7), Link(2e7, 3e-6, 1e-7)])),
        solve=draw(st.sampled_from(SOLVES)),
        host=draw(st.sampled_from(HOSTS)),
        backward_gemm_factor=draw(st.sampled_from([1.0, 1.45])),
        hidden=8,
        ffn=draw(st.sampled_from([4, 40])),
        restore_algorithm=draw(st.sampled_from(list(ExchangeAlgorithm))),
        recompute=draw(st.sampled_from(list(Recompute))),
        tokens=draw(st.sampled_from([TokenPrices(), NODE, replace(NODE, inter_rows=1 / 3)])),
    )


@st.composite
def cases(
    draw: st.DrawFn, of: st.SearchStrategy[Geometry] | None = None
) -> tuple[Geometry, Int64, ExpertLayout]:
    """Draw a geometry, counts of all kinds of skew, and a plan that is good, bad or exact."""
    geometry, seed = draw(geometries(40, 64) if of is None else of), draw(st.integers(0, 2**16))
    counts_NE = counts_of(draw(st.sampled_from(KINDS)), geometry, seed)
    planned = geometry.random_layout((seed,))
    if draw(st.booleans()):
        drifted_NE = counts_NE + np.random.default_rng(seed).integers(0, 5, counts_NE.shape)
        planned = construct_layout(drifted_NE, planned, geometry.node_size, geometry.sharding)
    return geometry, counts_NE, planned


def same(one: Decision, other: Decision) -> bool:
    return (
        one.layout == other.layout
        and np.array_equal(one.quotas.loads_S, other.quotas.loads_S)
        and one.reason == other.reason
        and (one.gain_s, one.cost_s) == (other.gain_s, other.cost_s)
    )


def check_legal(decision: Decision, counts_NE: Int64, geometry: Geometry) -> None:
    geometry.check_layout(decision.layout)
    loads_S, held_S = decision.quotas.loads_S, decision.layout.slot_expert_S.astype(int)
    loads_E = np.zeros(geometry.num_experts + 1, dtype=np.int64)
    np.add.at(loads_E, held_S, loads_S)  # the last place is of empty slots
    np.testing.assert_array_equal(loads_E, [*counts_NE.sum(axis=0), 0])
    again = exact_split(decision.layout, geometry.node_size).solve(counts_NE)
    if geometry.home_slots and geometry.num_nodes == 1:
        # Loads that the construction assigned, where they are used, are as balanced as a flow's.
        assert decision.quotas.rank_loads_N().max() == again.rank_loads_N().max()
    else:
        np.testing.assert_array_equal(again.loads_S, loads_S)

    assert decision.replanned == (decision.layout != decision.planned_layout)
    # Fewer replicas at home change no slot that is filled.
    assert geometry.home_slots or (decision.changed_slots > 0) == decision.replanned


@settings(max_examples=250)
@given(
    cases() | cases(home_geometries()),
    cost_models(),
    st.sampled_from([*((mode, None) for mode in GUARD_MODES), (PlanMode.ADAPTIVE, 0.1)]),
)
def test_decisions_are_legal_and_depend_on_nothing_but_the_arguments(
    case: tuple[Geometry, Int64, ExpertLayout],
    costs: CostModel,
    regime: tuple[PlanMode, float | None],
) -> None:
    (geometry, counts_NE, planned), (mode, tolerance) = case, regime
    guard = Guard(mode, costs, geometry, tolerance)
    decision = guard.decide(counts_NE, planned)
    check_legal(decision, counts_NE, geometry)
    if decision.replanned and decision.cost_s is not None:
        change_s = costs.change_seconds(planned, Placed(decision.layout, geometry))
        assert decision.cost_s == change_s
    loads_N = decision.quotas.loads_S.reshape(geometry.num_ranks, -1).sum(axis=1)
    if mode == PlanMode.EXACT and always_balances(geometry) and not geometry.home_slots:
        assert loads_N.max() == -(-counts_NE.sum() // geometry.num_ranks)
    # Earlier decisions, layout objects, guards and memory layouts must not matter.
    guard.decide(counts_NE[::-1].copy(), decision.layout)
    twin = ExpertLayout(
        planned.num_ranks, planned.capacity, planned.num_experts, bytes(planned.slot_bytes)
    )
    assert same(decision, guard.decide(counts_NE, twin))
    elsewhere_NE = np.asfortranarray(counts_NE)
    again = Guard(mode, costs, geometry, tolerance)
    assert same(decision, again.decide(elsewhere_NE, planned))


@settings(max_examples=150)
@given(cases(), cost_models())
def test_adaptive_takes_the_cheaper_and_its_early_way_out_changes_nothing(
    case: tuple[Geometry, Int64, ExpertLayout], costs: CostModel
) -> None:
    geometry, counts_NE, planned = case
    decision = Guard(PlanMode.ADAPTIVE, costs, geometry).decide(counts_NE, planned)

    # Evaluate both choices fully, without early exits.
    fresh = construct_layout(counts_NE, planned, geometry.node_size)
    kept_s = costs.layer_seconds(counts_NE, Placed(planned, geometry))
    fresh_s = costs.layer_seconds(counts_NE, Placed(fresh, geometry))
    cost_s = costs.change_seconds(planned, Placed(fresh, geometry))
    least_s = costs.least_layer_seconds(counts_NE, geometry)
    kept_exposed_s, fresh_exposed_s = (
        costs.exposed(Placed(layout, geometry), least_s).backward_s for layout in (planned, fresh)
    )
    if len(way_of(geometry, costs.restore_algorithm).links) == 1:  # all slots' rows, in one hop
        assert kept_exposed_s == fresh_exposed_s
        kept_exposed_s = fresh_exposed_s = 0.0
    gain_s = kept_s - fresh_s + (kept_exposed_s - fresh_exposed_s)
    wanted = fresh if gain_s > cost_s else planned
    assert decision.layout == wanted
    if decision.solved and decision.gain_s is not None:
        assert (decision.gain_s, decision.cost_s) == (gain_s, cost_s)
    elif not decision.solved:
        assert decision.gain_s == kept_s - least_s + kept_exposed_s
        assert decision.cost_s == costs.least_change_seconds(geometry)
        assert decision.gain_s >= gain_s
        assert fresh == planned or decision.cost_s <= cost_s
    chosen_s = fresh_s + fresh_exposed_s + cost_s if decision.replanned else kept_s + kept_exposed_s
    assert chosen_s <= (kept_s + kept_exposed_s) * (1 + 1e-12)


def test_no_replica_is_made_that_gains_less_than_it_takes_on_the_host() -> None:
    """Load one of three ranks by a fifth above the mean, where exchanges are free."""
    geometry = Geometry(3, 3, 2, 3, Sharding.EXPERTS)
    counts_NE, stock = np.array([[4, 3, 3]] * 3) * 1000, geometry.static_layout
    free = make_costs(intra=FREE, inter=FREE, points=((1, 1e12),), pairs_per_rank=10**4)
    balanced = replicate(counts_NE, geometry).layout
    stock_s, balanced_s = (
        free.layer_seconds(counts_NE, Placed(of, geometry)) for of in (stock, balanced)
    )
    gain_s = stock_s - balanced_s
    assert gain_s > 10 * free.solve_seconds(geometry) > 0
    # The host is about as late as the device in forward, or never; a slot more takes it some time.
    bound_s = stock_s * free.forward_share / 200
    for launch_s, part, pays in ((bound_s, 0.3, True), (bound_s, 2.0, False), (0.0, 2.0, True)):
        host = HostTime(launch_s, SolveTime(0.0, 0.0, 0.0), part * gain_s)
        costs = replace(free, cluster=replace(free.cluster, host=host))
        assert (GreedyStrategy(geometry, costs).plan(counts_NE, stock) != stock) == pays
        for mode, planned in (
            (PlanMode.EXACT, stock),
            (PlanMode.EXACT, balanced),
            (PlanMode.ADAPTIVE, stock),
        ):
            guard = Guard(mode, costs, geometry)
            assert (guard.decide(counts_NE, planned).layout != stock) == pays
        for beside_s in (0.0, balanced_s, 9.0):
            device_s = beside_s * costs.forward_share
            # Later than the device, with and without the replicas.
            one_s, two_s = (host.forward_seconds(85 + 10 * slots) for slots in (1, 2))
            with_s = max(two_s + host.replicas_s - device_s, 0.0)
            expected_s = with_s - max(one_s - device_s, 0.0)
            found_s = costs.exposed(Placed(balanced, geometry), beside_s).host_s
            assert found_s == pytest.approx(expected_s)
            assert costs.exposed(Placed(stock, geometry), beside_s).host_s == 0.0


@pytest.mark.parametrize(
    ("late", "gib", "layers", "stays"),
    [(1.01, 100, 8, True), (0.99, 100, 8, False), (1.01, 50, 8, False), (1.01, 100, None, False)],
    ids=["host is later", "device is later", "no memory", "device not known"],
)
def test_imbalance_that_the_host_hides_stays_where_memory_has_room(
    late: float, gib: float, layers: int | None, stays: bool
) -> None:
    """Let one of three ranks, on one node or on three, have three fifths of the tokens."""
    counts_NE = np.array([[6, 2, 2]] * 3) * 1000
    free = make_costs(intra=FREE, inter=FREE, points=((1, 1e12),), ffn=24000)
    free = replace(free, pairs_per_rank=10**4, tokens_per_rank=10**4)
    for node_size in (1, 3):
        geometry = Geometry(3, 3, 2, node_size, Sharding.EXPERTS)
        stock = Placed(geometry.static_layout, geometry)

        def with_launches(launch_s: float) -> CostModel:
            host = HostTime(launch_s, SolveTime(0.0, 0.0, 0.0))
            cluster = replace(free.cluster, host=host, card=Card(gib, 0.0, 1))
            return replace(free, cluster=cluster, layers=8)

        def later_s(launch_s: float, stock: Placed = stock) -> float:
            costs = with_launches(launch_s)
            hidden_s, _ = costs.hidden_by_host(stock.geometry)
            return hidden_s - costs.layer_seconds(counts_NE, stock)

        # The host's time grows with that of a launch; here both are as late.
        even_s = 1.0 - later_s(1.0) / (later_s(2.0) - later_s(1.0))
        assert later_s(even_s) == pytest.approx(0.0, abs=1e-9)
        costs = replace(with_launches(late * even_s), layers=layers)
        planned = GreedyStrategy(geometry, costs).plan(counts_NE, stock.layout)
        assert (planned == stock.layout) == stays
        for mode in (PlanMode.EXACT, PlanMode.ADAPTIVE):
            decision = Guard(mode, costs, geometry).decide(counts_NE, stock.layout)
            assert decision.replanned != stays
        if stays:
            assert decision.gain_s == 0.0 and not decision.solved, "nothing is left to gain"


def test_exchanges_of_replicas_at_home_are_no_gain_of_fresh_ones() -> None:
    """Fresh replicas have exchanges too: a plan that balances is kept, whatever its own take."""
    geometry = Geometry(3, 3, 2, 3, Sharding.EXPERTS)
    counts_NE = np.array([[4, 3, 3]] * 3) * 10
    costs = make_costs(intra=Link(1e8, 0.0), points=((1, 1e12),), ffn=40, solve=SOLVES[1])
    planned = replicate(counts_NE, geometry).layout
    placed = Placed(planned, geometry)
    exposed_s = costs.exposed(placed, costs.layer_seconds(counts_NE, placed)).backward_s
    assert exposed_s > costs.least_change_seconds(geometry)
    decision = Guard(PlanMode.ADAPTIVE, costs, geometry).decide(counts_NE, planned)
    assert not decision.solved and decision.layout is planned and decision.gain_s == 0.0


@pytest.mark.parametrize("tokens", [TokenPrices(), NODE])
def test_replicas_are_chosen_anew_only_where_balance_could_pay(tokens: TokenPrices) -> None:
    """Qwen3-235B on four nodes: chance alone leaves little to gain, and a jump much."""
    geometry = Geometry(32, 128, 6, 8, Sharding.EXPERTS)
    costs = CostModel(load_cluster("h100-8"), 4096, 1536, True, 2, tokens=tokens)
    costs = replace(costs.with_exchange(Auto.AUTO, geometry), pairs_per_rank=16384)
    guard = Guard(PlanMode.ADAPTIVE, costs, geometry)
    rng = np.random.default_rng(0)

    def seconds(decision: Decision) -> float:
        layer_s = costs.split_seconds(decision.quotas.totals(), geometry)
        return layer_s + costs.exposed(Placed(decision.layout, geometry), layer_s).backward_s

    for _ in range(6):
        share_E, other_E = rng.lognormal(0, 0.6, 128), rng.lognormal(0, 2.0, 128)
        draws = [
            rng.multinomial(16384, of_E / of_E.sum(), size=32).astype(np.int64)
            for of_E in (share_E, share_E, other_E)
        ]
        planned = GreedyStrategy(geometry, costs).plan(draws[0], geometry.static_layout)
        kept = guard.decide(draws[1], planned)
        assert not kept.solved and kept.reason.startswith("kept forecast: gain at most ")
        fresh = Guard(PlanMode.EXACT, costs, geometry).decide(draws[1], planned)
        change_s = costs.change_seconds(planned, Placed(fresh.layout, geometry))
        assert seconds(kept) <= seconds(fresh) + change_s
        assert guard.decide(draws[2], planned).replanned


@settings(max_examples=150)
@given(cases(), st.sampled_from([0.0, 0.05, 0.5]))
def test_tolerance_keeps_what_is_good_enough_and_never_takes_what_is_worse(
    case: tuple[Geometry, Int64, ExpertLayout], tolerance: float
) -> None:
    geometry, counts_NE, planned = case
    tolerance = min(tolerance, geometry.num_ranks / 2)
    guard = Guard(PlanMode.ADAPTIVE, COMPUTE_ONLY, geometry, tolerance)
    decision = guard.decide(counts_NE, planned)
    check_legal(decision, counts_NE, geometry)
    before, after = decision.max_over_mean_before, decision.max_over_mean_after
    assert before is not None and after <= before
    if before <= 1 + tolerance:
        assert not decision.solved and decision.layout is planned
    if decision.replanned:
        assert after < before
        fresh = construct_layout(counts_NE, planned, geometry.node_size)
        assert decision.layout == fresh
    total = int(counts_NE.sum())
    if always_balances(geometry) and total % geometry.num_ranks == 0:
        assert after <= 1 + tolerance


HOT_NE = np.array([[90, 2, 2, 2], [90, 2, 2, 2], [90, 2, 2, 2], [90, 2, 2, 2]])


def decide(mode: str, costs: CostModel, tolerance: float | None = None) -> Decision:
    """Give expert 0 94 % of the tokens, and one slot of eight in the planned layout."""
    planned = ExpertLayout.from_slots(4, 2, 4, [0, 1, 1, 2, 2, 3, 3, 1])
    return Guard(mode, costs, Geometry(4, 4, 2, 4), tolerance).decide(HOT_NE, planned)


def test_reasons_say_what_was_compared() -> None:
    slow = make_costs(points=((1, 1e8),), solve=SolveTime(5e-4, 0.0, 0.0))
    gain_ms = (360 - 96) * 3 * slow.flops_per_token / 1e8 * 1e3
    taken = decide(PlanMode.ADAPTIVE, slow)
    slots = taken.changed_slots
    assert taken.reason.startswith("fresh layout: max/mean 3.75 -> 1.00, gain ")
    assert taken.reason.endswith(f" ms > cost 0.5 ms ({slots} slots changed)")
    assert taken.gain_s is not None and taken.gain_s * 1e3 == pytest.approx(gain_ms, rel=0.01)

    # The gain cannot reach the cost; this is clear without a fresh layout.
    early = decide(PlanMode.ADAPTIVE, make_costs(solve=SolveTime(1.0, 0.0, 0.0)))
    assert not early.solved and early.reason.startswith("kept forecast: gain at most ")

    # Every rank of the fresh layout has a second, small GEMM that is as slow as 80 tokens.
    small = make_costs(points=((80, 1e8),), intra=FREE, solve=SolveTime(0.055, 0.0, 0.0))
    late = decide(PlanMode.ADAPTIVE, small)
    assert late.solved and not late.replanned and " < cost " in late.reason

    exact, forecast = decide(PlanMode.EXACT, slow), decide(PlanMode.FORECAST, slow)
    assert exact.reason == f"fresh layout: max/mean 1.00 ({slots} slots changed)"
    assert exact.planned_quotas is None and forecast.quotas is forecast.planned_quotas
    assert forecast.reason == "forecast: max/mean 3.75"
    kept = decide(PlanMode.ADAPTIVE, slow, tolerance=2.8)
    assert kept.reason == "kept forecast: max/mean 3.75, tolerance 3.80"

    # One line for many layers explains the largest gain; without a gain, the largest imbalance.
    many = {"layer 1": early, "layer 2": taken, "layer 3": early}
    counts = "kept forecast in 2 layers, fresh layout in 1 layer"
    assert in_words(many) == f"{counts}; layer 2: {taken.reason}"
    even = replace(decide(PlanMode.ADAPTIVE, slow, tolerance=0.1), planned_quotas=None)
    counts = "fresh layout in 1 layer, kept forecast in 1 layer"
    assert in_words({"layer 1": even, "layer 2": kept}) == f"{counts}; layer 2: {kept.reason}"


def test_layers_that_are_not_quantised_are_decided_at_their_own_prices() -> None:
    """Let a change cost more than it saves in fp8, and less than in bf16, which is half as fast."""
    free = make_costs(points=((1, 1e8),), intra=FREE, inter=FREE)
    gain_s = (360 - 96) * 3 * free.flops_per_token / 1e8
    cluster = replace(free.cluster, solve=SolveTime(0.75 * gain_s, 0.0, 0.0))
    costs = replace(free, cluster=cluster, precision=Precision.TENSORWISE)
    geometry = Geometry(4, 4, 2, 4)
    planned = ExpertLayout.from_slots(4, 2, 4, [0, 1, 1, 2, 2, 3, 3, 1])
    quantised = Guard(PlanMode.ADAPTIVE, costs, geometry)
    for guard, part in ((quantised, 0.5), (quantised.in_bf16, 1.0)):
        decision = guard.decide(HOT_NE, planned)
        assert decision.gain_s == pytest.approx(part * gain_s, rel=0.01)
        assert decision.replanned == (part == 1.0)


def test_the_even_split_keeps_the_forecast_and_combinations_without_meaning_are_refused() -> None:
    geometry = Geometry(4, 4, 2, 4)
    planned = ExpertLayout.static(4, 2, 4)
    decision = Guard(PlanMode.FORECAST, COMPUTE_ONLY, geometry, split=Split.EVEN).decide(
        HOT_NE, planned
    )
    assert decision.layout is planned and decision.max_over_mean_after > 1
    with pytest.raises(ValueError, match="'adaptive' makes layouts for the exact split"):
        Guard(PlanMode.ADAPTIVE, COMPUTE_ONLY, geometry, split=Split.EVEN)
    geometry = Geometry(4, 4, 2, 4)
    with pytest.raises(ValueError, match="'guess': must be one of forecast, exact"):
        Guard(PlanMode("guess"), COMPUTE_ONLY, geometry)
    with pytest.raises(ValueError, match="'odd': must be one of exact, even"):
        Guard(PlanMode.FORECAST, COMPUTE_ONLY, geometry, split=Split("odd"))
    with pytest.raises(ValueError, match=r"a tolerance of 0\.1 has no effect on plan mode 'exact'"):
        Guard(PlanMode.EXACT, COMPUTE_ONLY, geometry, 0.1)
    for wrong in (-0.1, 4.0, float("nan")):
        with pytest.raises(ValueError, match=rf"tolerance {wrong}: must be at least 0 and less"):
            Guard(PlanMode.ADAPTIVE, COMPUTE_ONLY, geometry, wrong)
    guard = Guard(PlanMode.ADAPTIVE, COMPUTE_ONLY, geometry)
    with pytest.raises(ValueError, match=r"shape \(2, 4\)"):
        guard.decide(np.ones((2, 4), dtype=np.int64), ExpertLayout.static(4, 2, 4))
    with pytest.raises(ValueError, match=r"the planner for \(4, 2, 4\)"):
        guard.decide(HOT_NE, ExpertLayout.static(4, 3, 4))
