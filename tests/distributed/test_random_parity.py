"""Random legal combinations of settings train as stock does: some in CI, many at night.

`python -m tests.parity.random` runs others.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from tests.parity.random.generator import Case, draw
from tests.parity.random.judge import Verdict, judge
from tests.parity.rows import BLOCKS, IN_FP8

AT_NIGHT = range(1000, 1200)
# Cheap ones of these, on 2 and 4 ranks, for fewer steps.
IN_CI = (1005, 1078, 1096, 1187)
STEPS_IN_CI = 3

CASES = [
    *(pytest.param(draw(seed, STEPS_IN_CI), id=f"{seed}, {STEPS_IN_CI} steps") for seed in IN_CI),
    *(pytest.param(draw(seed), id=f"{seed}", marks=pytest.mark.nightly) for seed in AT_NIGHT),
]


@pytest.mark.parametrize("case", CASES)
def test_a_random_case_equals_stock(case: Case, ranks: RankPools, text_data: str) -> None:
    judgement = judge(case, ranks, text_data)
    print(f"\n{judgement}")
    assert not judgement.verdict.is_fault, str(judgement)
    if judgement.verdict is Verdict.SKIPPED:
        assert case.seed not in IN_CI, f"stock trained this case once: {judgement.message}"
        pytest.skip(judgement.message)


ERROR = 1e-3  # relative, of a gradient


def with_faulty_router(model: torch.nn.Module) -> None:
    """Scale the gradients of FSEP's routers."""
    from megatron_laer.layer.moe_layer import FSEPMoELayer

    for part in model.modules():
        if isinstance(part, FSEPMoELayer):
            part.router.weight.register_hook(lambda grad: grad * (1 + ERROR))


PLAIN = draw(1052, STEPS_IN_CI)


@pytest.mark.nightly
def test_a_wrong_gradient_is_beyond_all_floors(ranks: RankPools, text_data: str) -> None:
    """Floors of fp8 from weights a rounding off hide none, though such weights move as much."""
    flags, fsep = PLAIN.row.flags + BLOCKS, PLAIN.row.fsep + IN_FP8
    row = replace(PLAIN.row, flags=flags, fsep=fsep, adapt=with_faulty_router)
    faulty = replace(PLAIN, row=row, features=(*PLAIN.features, "fp8 by blocks"))
    judgement = judge(faulty, ranks, text_data)
    assert judgement.verdict is Verdict.BEYOND
    grads = judgement.distances["FSEP"].grads
    assert ERROR / 2 < grads < 2 * ERROR, "another fault than the planted one"
