"""A small model learns real text with FSEP as well as with stock expert parallelism."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record, train
from tests.parity.flags import command_line

STEPS = 250
# Bytes of Python sources: a uniform guess has a loss of ln 257 = 5.55. Stock reaches 2.21 here
# (`pytest tests/convergence -s` prints it); the bound leaves room for another machine's rounding.
VALIDATION_BOUND = 2.3
FLAGS = (
    " --num-layers 2 --hidden-size 96 --ffn-hidden-size 128 --seq-length 96"
    " --max-position-embeddings 96 --lr 2e-3 --min-lr 1e-5 --lr-decay-style cosine"
    " --lr-warmup-iters 20 --micro-batch-size 4 --eval-iters 16"
)
ROWS = " --expert-parallel-mode fsep --fsep-late-plan wait --fsep-sharding rows"
# The paper's system, with as few slots as balance well.
LAER = " --expert-parallel-mode fsep --fsep-late-plan wait --fsep-preset laer --fsep-capacity 6"


def balance_of_step(model: object) -> tuple[float, float, int]:
    """Return mean max/mean tokens per rank of the step, as computed and in stock's placement.

    The last number is the layouts' version.
    """
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    if coordinator is None:
        return 0.0, 0.0, -1
    samples = [one for layer in coordinator.layers for one in layer.statistics.take_outcomes()]
    if not samples:  # but on rank 0
        return 0.0, 0.0, coordinator.layouts.version
    ratios = [(one.ratio, one.stock_ratio) for one in samples]
    ours, stocks = (sum(of) / len(of) for of in zip(*ratios, strict=True))
    return ours, stocks, coordinator.layouts.version


Run = Callable[[str], Record]


@pytest.fixture(scope="module")
def run(ranks: RankPools, text_data: str) -> Run:
    def trained(mode: str) -> Record:
        flags = command_line(text_data, FLAGS + mode, global_batch=8, steps=STEPS)
        record: Record = ranks(2).run(train, flags, balance_of_step, timeout_s=3600.0)[0]
        return record

    return trained


@pytest.fixture(scope="module")
def stock(run: Run) -> Record:
    """Train with stock once, for all that is compared with it."""
    return run("")


@pytest.mark.parametrize(("fsep", "most"), [(ROWS, 1.01), (LAER, 1.1)], ids=["default", "laer"])
def test_a_small_model_learns_text_as_with_stock(
    run: Run, stock: Record, fsep: str, most: float
) -> None:
    found = run(fsep)
    expected, learned = stock.eval_losses[-1], found.eval_losses[-1]
    balance, stocks = (sum(of) / STEPS for of in list(zip(*found.probes, strict=True))[:2])
    print(
        f"\n{STEPS} steps with{fsep}: training loss {found.losses[0]:.3f} to "
        f"{found.losses[-1]:.3f}, validation loss {learned:.4f} (stock {expected:.4f}), max/mean "
        f"{balance:.3f} (stock's placement {stocks:.3f})"
    )
    assert found.probes[-1][2] == STEPS - 1, "layouts must change, or FSEP is not what learned"
    assert learned < VALIDATION_BOUND
    assert learned == pytest.approx(expected, rel=0.005)
    assert balance < most < stocks
