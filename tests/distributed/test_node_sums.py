"""In bf16, tokens by nodes leave stock's first gradients only by near-ties of rounding.

A token's partial sums are rounded before they leave a rank; stock has no such rounding. So scores
of the next routers differ by a rounding, and tokens with close k-th and (k+1)-th scores go
elsewhere. One such token moves the gradient of an expert with few tokens by more than the bound. A
clamp has near-ties too: within a rounding of it, a gradient is cut or not.

Legend: C router calls in a run's order, T tokens of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.parity.compare import Distance, distance
from tests.parity.decisions import Decisions
from tests.parity.random.on_ranks import Outcome, train_case
from tests.parity.row import BF16_BOUND, FLOOR_FACTOR, SMALLEST_FLOOR, Row
from tests.parity.rows import CLAMPED_GEGLU, TOKENS

# Relative, of a number in bf16; a score is a sum of several.
ROUNDING = 2.0**-8
FEW = 4

# Many tokens make near-ties certain for any machine's rounding.
ROW = Row(
    "node-sums",
    "tokens by nodes in bf16",
    stock_parallel=(2, 1),
    flags=" --bf16 --moe-router-topk 3 --num-layers 4 --micro-batch-size 8",
    accumulation=4,
    fsep=" --fsep-planner static" + TOKENS.format(1),
    bound=BF16_BOUND,
    steps=1,
)
CLAMPED = replace(
    ROW,
    id="node-sums-clamped",
    name="tokens by nodes in bf16, clamped",
    flags=ROW.flags + CLAMPED_GEGLU,
    without="--swiglu",
)


@dataclass(frozen=True)
class Compared:
    """Stock's and FSEP's runs of a row: by itself, given stock's choices, and with exact sums in
    fp32.

    `floor` is the distance of stock with other placement.
    """

    floor: Distance
    stock: list[Outcome]
    by_itself: list[Outcome]
    given: list[Outcome]
    exact: list[Outcome]

    def distance(self, run: list[Outcome]) -> Distance:
        return distance(run[0].record, self.stock[0].record)


def decisions(run: list[Outcome]) -> Decisions:
    found = [outcome.decisions for outcome in run if outcome.decisions is not None]
    return Decisions.of_all_ranks(found)


both = pytest.mark.parametrize("compared", [ROW, CLAMPED], ids=["plain", "clamped"], indirect=True)
without_clamp = pytest.mark.parametrize("compared", [ROW], ids=["plain"], indirect=True)


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest, ranks: RankPools, text_data: str) -> Compared:
    row: Row = request.param

    def train(run: tuple[int, list[str]], *more: object) -> list[Outcome]:
        size, command = run
        outcomes: list[Outcome] = ranks(size).run(train_case, command, True, *more)
        return outcomes

    stock, other = train(row.reference(text_data)), train(row.other_stock(text_data))
    chosen = [outcome.decisions.chosen_CTK for outcome in stock if outcome.decisions]
    command = row.fsep_run(text_data)
    floor = distance(other[0].record, stock[0].record).at_least(SMALLEST_FLOOR)
    by_itself, given = train(command), train(command, chosen)
    found = Compared(floor, stock, by_itself, given, train(command, None, True))
    print(f"\n{row.name}: floor {floor}")
    for name in ("by_itself", "given", "exact"):
        run = getattr(found, name)
        count = decisions(run).differ_CT(decisions(stock)).sum()
        print(f"  {name}: {found.distance(run)}, {count} choices differ")
    return found


@both
def test_choices_differ_at_near_ties_alone(compared: Compared) -> None:
    run, stock = decisions(compared.given), decisions(compared.stock)
    differ_CT, gaps_CT = run.differ_CT(stock), run.gaps_CT(stock)
    assert differ_CT.any(), "no near-tie, so nothing is shown"
    rounding_C = FEW * ROUNDING * np.abs(stock.scores_CTE).max(axis=(1, 2))
    assert (gaps_CT.max(axis=1) <= rounding_C).all()
    for call in np.flatnonzero(differ_CT.any(axis=1)):
        margins = stock.margins_T(int(call))[differ_CT[call]]
        assert (margins <= 2 * rounding_C[call]).all()


@without_clamp
def test_a_run_that_takes_stocks_choices_is_within_the_bound(compared: Compared) -> None:
    found = compared.distance(compared.given)
    assert found.within(BF16_BOUND), found


@both
def test_nothing_but_the_rounding_of_partial_sums_parts_the_runs(compared: Compared) -> None:
    assert not decisions(compared.exact).differ_CT(decisions(compared.stock)).any()
    found = compared.distance(compared.exact)
    assert found.within(compared.floor.times(FLOOR_FACTOR)), found
