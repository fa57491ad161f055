"""An FSEP run leaves stock's numbers only where rounding decides a near-tie in a router.

Another layout sums experts' gradients in another order, so the routers' scores differ in their last
bits. A token with such close k-th and (k+1)-th scores goes to another expert, and the runs differ
from there on. The machine's rounding decides which run meets a near-tie, so one is searched for.
At night, since the daily rows of test_parity.py hold the same distances for fewer steps.

Legend: C router calls in a run's order (step, layer), T tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record
from tests.parity.compare import Distance, distance
from tests.parity.decisions import Chosen, Decisions, train_choosing
from tests.parity.flags import command_line
from tests.parity.row import FLOOR_FACTOR, FP32_BOUND, SMALLEST_FLOOR

pytestmark = pytest.mark.nightly

STEPS = 40
LAYERS = 4
SEEDS = range(2, 10)
# The default comes first, with plans that arrive at the same step in a repetition.
LAYOUTS = [
    "--fsep-late-plan wait",
    "--fsep-planner random",
    "--fsep-planner static",
    "--fsep-plan-mode exact",
]
FLAGS = (
    f" --num-layers {LAYERS} --hidden-size 32 --moe-ffn-hidden-size 16 --moe-router-topk 8"
    " --seq-length 32 --max-position-embeddings 32 --micro-batch-size 64"
)


@dataclass(frozen=True)
class Run:
    record: Record
    decisions_by_rank: list[Decisions]

    @property
    def decisions(self) -> Decisions:
        return Decisions.of_all_ranks(self.decisions_by_rank)

    @property
    def chosen(self) -> list[Chosen]:
        return [decisions.chosen_CTK for decisions in self.decisions_by_rank]


@dataclass(frozen=True)
class Reference:
    """Stock run and its sensitivity to rounding.

    Attributes:
        rounding_C: bound of score differences up to each call, in proportion to the floor's.
        floor: distance to a stock run with different expert placement and the same choices.
        differ_CT: where that run would have chosen otherwise by itself.
    """

    stock: Run
    rounding_C: npt.NDArray[np.float32]
    floor: Distance
    differ_CT: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """FSEP run against its reference: gaps of calls' scores, and tokens with other experts."""

    name: str
    train: Callable[..., Run]
    run: Run
    reference: Reference
    gap_C: npt.NDArray[np.float32]
    differ_CT: npt.NDArray[np.bool_]

    @property
    def first(self) -> int | None:
        calls = np.flatnonzero(self.differ_CT.any(axis=1))
        return int(calls[0]) if calls.size else None

    @property
    def leaves(self) -> bool:
        return bool((self.gap_C > self.reference.rounding_C).any())

    @property
    def excess(self) -> float:
        """Return the largest ratio of score difference to bound, first other choice included."""
        calls = len(self.gap_C) if self.first is None else self.first + 1
        return float((self.gap_C / self.reference.rounding_C)[:calls].max())


@dataclass(frozen=True)
class Search:
    """Excess of all compared runs by name, and the first run that left stock, if any."""

    excess: dict[str, float]
    leaving: Comparison | None


def compare(name: str, train: Callable[..., Run], run: Run, reference: Reference) -> Comparison:
    mine, stocks = run.decisions, reference.stock.decisions
    gap_C = mine.gaps_CT(stocks).max(axis=1)
    return Comparison(name, train, run, reference, gap_C, mine.differ_CT(stocks))


def reference_of(train: Callable[..., Run]) -> Reference:
    stock = train("", expert_parallel=2)
    other = train("", expert_parallel=1, given=stock.chosen)
    stocks, others = stock.decisions, other.decisions
    smallest_C = SMALLEST_FLOOR * np.abs(stocks.scores_CTE).max(axis=(1, 2))
    found_C = np.maximum(others.gaps_CT(stocks).max(axis=1), smallest_C)
    return Reference(
        stock,
        rounding_C=FLOOR_FACTOR * np.maximum.accumulate(found_C),
        floor=distance(other.record, stock.record).at_least(SMALLEST_FLOOR),
        differ_CT=others.differ_CT(stocks),
    )


@pytest.fixture(scope="module")
def searched(ranks: RankPools, text_data: str) -> Search:
    """Run FSEP with one kind of layouts and order of data after the other, until one leaves."""

    def train(
        seed: int, extra: str, expert_parallel: int = 2, given: list[Chosen] | None = None
    ) -> Run:
        flags = command_line(
            text_data,
            f"{FLAGS} --seed {seed}{extra}",
            experts=32,
            expert_parallel=expert_parallel,
            global_batch=128,
            steps=STEPS,
        )
        results = ranks(2).run(train_choosing, flags, given)
        return Run(results[0][0], [decisions for _, decisions in results])

    excess: dict[str, float] = {}
    for seed in SEEDS:
        reference = reference_of(partial(train, seed))
        for layouts in LAYOUTS:
            again = partial(
                train, seed, f" --expert-parallel-mode fsep --fsep-sharding rows {layouts}"
            )
            found = compare(f"{layouts}, seed {seed}", again, again(), reference)
            excess[found.name] = found.excess
            if found.leaves:
                return Search(excess, found)
    return Search(excess, None)


@pytest.fixture
def leaving(searched: Search) -> Comparison:
    assert searched.leaving is not None, (
        f"no run left stock, so nothing is shown: {'; '.join(searched.excess)}"
    )
    return searched.leaving


def test_scores_are_stocks_but_for_rounding_until_a_decision_differs(searched: Search) -> None:
    for name, excess in searched.excess.items():
        print(f"\n{name}: {FLOOR_FACTOR * excess:.1f} of {FLOOR_FACTOR} floors")
        assert excess <= 1.0, f"{name}: left stock before a decision differed"


def test_the_first_decision_that_differs_is_a_near_tie(
    leaving: Comparison, record_property: Callable[[str, object], None]
) -> None:
    call = leaving.first
    assert call is not None
    stock = leaving.reference.stock.decisions
    tokens = np.flatnonzero(leaving.differ_CT[call])
    margins = stock.margins_T(call)[tokens]
    gaps = leaving.run.decisions.gaps_CT(stock)[call, tokens]
    rounding = leaving.reference.rounding_C[call]
    shared = leaving.reference.differ_CT[call, tokens].sum()
    figures = (
        f"{leaving.name}: step {call // LAYERS + 1}, layer {call % LAYERS + 1}, tokens "
        f"{tokens.tolist()} of {leaving.differ_CT.shape[1]}: margin {margins.max():.1e}, scores "
        f"{gaps.max():.1e} from stock's, floor {rounding / FLOOR_FACTOR:.1e}; "
        f"of these tokens {shared} for a stock run with different expert placement too"
    )
    record_property("near_tie", figures)
    print(f"\n{figures}")
    assert (margins <= 2 * gaps).all(), "the difference of scores does not explain the choice"
    assert (margins <= 2 * rounding).all()


def test_a_run_that_takes_stocks_choice_at_near_ties_stays_with_stock(leaving: Comparison) -> None:
    reference, call = leaving.reference, leaving.first
    assert call is not None
    run = leaving.train(given=reference.stock.chosen)
    kept = compare(leaving.name, leaving.train, run, reference)
    # The same run up to the near-tie, at which its routers would choose as they did.
    before = slice(call // LAYERS)
    assert run.record.losses[before] == leaving.run.record.losses[before]
    upto = slice(call + 1)
    assert np.array_equal(kept.differ_CT[upto], leaving.differ_CT[upto])

    found = distance(run.record, reference.stock.record)
    print(
        f"\n{leaving.name}: stock's choice for {kept.differ_CT.sum()} of {kept.differ_CT.size}"
        f"\n  own choice    {distance(leaving.run.record, reference.stock.record)}"
        f", scores {leaving.gap_C.max():.1e}"
        f"\n  stock's       {found}, scores {kept.gap_C.max():.1e}"
        f"\n  floor         {reference.floor}, scores {reference.rounding_C[-1] / FLOOR_FACTOR:.1e}"
    )
    assert not kept.leaves
    assert found.within(FP32_BOUND)
    assert found.within(reference.floor.times(FLOOR_FACTOR))
