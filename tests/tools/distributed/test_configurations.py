"""Small configurations, one of each kind, train with FSEP as with stock Megatron."""

from __future__ import annotations

import pytest

from megatron_laer.cpu import training
from megatron_laer.device import CPU_FLAGS
from megatron_laer.tools.model_flags import model_flags
from tests.configurations import MODELS

TINY = [name for name in MODELS if name.startswith("tiny-")]
_STEPS = 3
_RUN_FLAGS = (
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant "
    f"--clip-grad 1.0 --train-iters {_STEPS} --eval-iters 0 --eval-interval 1000 --split 90,10,0 "
    "--num-workers 0 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --seed 1234"
).split()


@pytest.mark.parametrize(
    "name",
    # Each day the parity rows train the features of the others.
    [pytest.param(n, marks=[] if n == "tiny-moe" else [pytest.mark.nightly]) for n in TINY],
)
def test_a_small_one_of_each_kind_trains_as_stock(name, ranks, text_data):
    flags = [*model_flags(name), *CPU_FLAGS, *_RUN_FLAGS, "--data-path", text_data]
    fsep, stock = (
        ranks(2).run(training.train, [*flags, "--expert-parallel-mode", mode])[0]
        for mode in ("fsep", "standard")
    )
    assert len(fsep.losses) == _STEPS and fsep.losses[-1] < fsep.losses[0]
    assert fsep.losses == pytest.approx(stock.losses, rel=1e-5)
    assert fsep.grad_norms == pytest.approx(stock.grad_norms, rel=1e-4)
