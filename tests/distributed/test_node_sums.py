"""In bf16, nothing but the rounding of tokens' partial sums parts tokens by nodes from stock.

A token's partial sums are rounded before they leave a rank; stock has no such rounding. So scores
of the next routers differ by a rounding, and tokens with close k-th and (k+1)-th scores go
elsewhere. One such token moves the gradient of an expert with few tokens by more than the bound. A
clamp has near-ties too: within a rounding of it, a gradient is cut or not. With sums in fp32 there
is neither. Random combinations are judged with the rounding, at night.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.parity.compare import distance
from tests.parity.decisions import differ
from tests.parity.random.on_ranks import Outcome, train_case
from tests.parity.row import FLOOR_FACTOR, SMALLEST_FLOOR, Row
from tests.parity.rows import CLAMPED_GEGLU, TOKENS

# Many tokens make near-ties certain for any machine's rounding.
ROW = Row(
    "node-sums",
    stock_parallel=(2, 1),
    flags=" --bf16 --moe-router-topk 3 --num-layers 4 --micro-batch-size 8",
    accumulation=4,
    fsep=" --fsep-planner static" + TOKENS.format(1),
    steps=1,
)
CLAMPED = replace(ROW, flags=ROW.flags + CLAMPED_GEGLU, without="--swiglu")


@pytest.mark.parametrize("row", [ROW, CLAMPED], ids=["plain", "clamped"])
def test_nothing_but_the_rounding_of_partial_sums_parts_the_runs(
    ranks: RankPools, text_data: str, row: Row
) -> None:
    def train(run: tuple[int, list[str]], *more: object) -> list[Outcome]:
        size, command = run
        outcomes: list[Outcome] = ranks(size).run(train_case, command, True, *more)
        return outcomes

    stock, other = train(row.reference(text_data)), train(row.other_stock(text_data))
    rounded, exact = (train(row.fsep_run(text_data), None, in_fp32) for in_fp32 in (False, True))
    chosen = [
        np.concatenate([outcome.chosen_CTK for outcome in run], axis=1)
        for run in (stock, rounded, exact)
    ]
    assert differ(chosen[1], chosen[0]).any(), "no near-tie, so nothing is shown"
    assert not differ(chosen[2], chosen[0]).any()
    floor = distance(other[0].record, stock[0].record).at_least(SMALLEST_FLOOR)
    found = distance(exact[0].record, stock[0].record)
    print(f"\nfloor {floor}\nexact {found}")
    assert found.within(floor.times(FLOOR_FACTOR)), found
