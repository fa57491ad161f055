"""Random legal combinations of settings train as stock does: some in CI, many at night.

`python -m tests.parity.random` runs others.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_laer.testing.ranks import RankPool
from tests.parity.random.generator import draw
from tests.parity.random.judge import Verdict, judge
from tests.parity.random.report import line

IN_CI = range(20)
AT_NIGHT = range(1000, 1200)

SEEDS = [
    *(pytest.param(seed, marks=pytest.mark.counts(random_cases=1)) for seed in IN_CI),
    *(
        pytest.param(seed, marks=[pytest.mark.nightly, pytest.mark.counts(random_cases=1)])
        for seed in AT_NIGHT
    ),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_case_equals_stock(
    seed: int, ranks: Callable[[int], RankPool], text_data: str
) -> None:
    judgement = judge(draw(seed), ranks, text_data)
    print(f"\n{line(judgement)}")
    assert not judgement.verdict.is_fault, line(judgement)
    if judgement.verdict is Verdict.SKIPPED:
        pytest.skip(judgement.message)
