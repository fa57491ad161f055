"""Random legal combinations of settings train as stock does: some in CI, many at night.

`python -m tests.parity.random` runs others.
"""

from __future__ import annotations

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.parity.random.generator import Case, draw
from tests.parity.random.judge import Verdict, judge
from tests.parity.random.report import line

AT_NIGHT = range(1000, 1200)
# Cheap ones of these, on 2 and 4 ranks, for fewer steps.
IN_CI = (1005, 1078, 1096, 1112, 1116, 1123, 1178, 1180, 1187)
STEPS_IN_CI = 3

CASES = [
    *(pytest.param(draw(seed, STEPS_IN_CI), id=f"{seed}, {STEPS_IN_CI} steps") for seed in IN_CI),
    *(pytest.param(draw(seed), id=f"{seed}", marks=pytest.mark.nightly) for seed in AT_NIGHT),
]


@pytest.mark.counts(random_cases=1)
@pytest.mark.parametrize("case", CASES)
def test_a_random_case_equals_stock(case: Case, ranks: RankPools, text_data: str) -> None:
    judgement = judge(case, ranks, text_data)
    print(f"\n{line(judgement)}")
    assert not judgement.verdict.is_fault, line(judgement)
    if judgement.verdict is Verdict.SKIPPED:
        pytest.skip(judgement.message)
