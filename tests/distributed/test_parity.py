"""FSEP equals stock Megatron: losses, gradient norms, gradients and weights, for every layout.

Each row of `ROWS` is one combination. Stock and FSEP start from the same weights and train in
Megatron's own loop; FSEP gets a new random layout at every microbatch. The distance between two
stock runs with different expert placement is the noise floor of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Adapt, Record
from tests.parity.compare import Distance, distance
from tests.parity.replay import train_row
from tests.parity.row import AT_HOME, FLOOR_FACTOR, LONG, SMALLEST_FLOOR, STEPS, Row
from tests.parity.rows import ALL_ROWS, RANDOM, STEP, daily
from tests.releases import refused_flags


def check_nothing_left(model: object) -> tuple[int, int, int]:
    """Check that no plans are left after a step; return restores and reduces so far."""
    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    if coordinator is None:
        return 0, 0, 0
    count = coordinator.streams.exchange.count
    return (sum(len(layer.reruns) for layer in coordinator.layers), count.restores, count.reduces)


@pytest.fixture(scope="module")
def stock(ranks: RankPools) -> Callable[[int, list[str], Adapt | None], Record]:
    """Return `stock(ranks, flags, adapt)`: a stock run, shared by rows with the same one."""
    records: dict[tuple[int, str, Adapt | None], Record] = {}

    def run(size: int, flags: list[str], adapt: Adapt | None) -> Record:
        key = size, " ".join(flags), adapt
        if key not in records:
            records[key] = ranks(size).run(train_row, flags, None, adapt)[0]
        return records[key]

    return run


@pytest.fixture(scope="module")
def refused() -> dict[str, str]:
    return refused_flags([row.flags for row in ALL_ROWS])


def parameters(row: Row) -> Iterator[object]:
    """Return the row as pytest's parameters with its marks; long training is nightly."""
    marks = [pytest.mark.releases] if row.releases else []
    marks += [] if row.id in daily() else [pytest.mark.nightly]
    yield pytest.param(replace(row, steps=min(row.steps, STEPS)), id=row.id, marks=marks)
    longer = row.at_night or row.steps
    if longer > STEPS:
        longer_row = replace(row, steps=longer)
        yield pytest.param(longer_row, id=f"{row.id}-{longer}", marks=[pytest.mark.nightly])


@pytest.mark.parametrize("row", [parameter for row in ALL_ROWS for parameter in parameters(row)])
def test_fsep_equals_stock(
    row: Row,
    refused: dict[str, str],
    ranks: RankPools,
    stock: Callable[[int, list[str], Adapt | None], Record],
    text_data: str,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:
    if row.flags in refused:
        assert not row.releases, "the page says that the oldest Megatron runs this row"
        pytest.skip(refused[row.flags])
    reference = stock(*row.reference(text_data), row.adapt)
    size, command = row.fsep_run(text_data)
    fsep: Record = ranks(size).run(train_row, command, check_nothing_left, row.adapt)[0]

    assert len(fsep.losses) == row.steps and len(fsep.eval_losses) == row.evaluations
    assert bool(fsep.first_grads) == row.gradients
    logged = any(max(values) > 0.0 for values in fsep.moe_losses.values())
    assert logged == ("--moe-aux-loss-coeff" in row.flags)
    if row.steps:
        falls = 0.8 if row.steps >= LONG else 0.95
        assert fsep.losses[-1] < falls * fsep.losses[0], "must learn, or little is compared"
    found = distance(fsep, reference)
    floor = Distance(*(SMALLEST_FLOOR,) * len(found.parts()))
    # Every floor is at least this one; beyond it, or for the page's figures, it is measured.
    if not found.within(floor.times(FLOOR_FACTOR)) or pytestconfig.getoption("xmlpath"):
        other = stock(*row.other_stock(text_data), row.adapt)
        floor = distance(other, reference).at_least(SMALLEST_FLOOR)
    if row in ALL_ROWS:  # the page of supported settings has the figures of whole rows
        record_property("row", row.name)
    record_property("floor", str(floor))
    record_property("fsep", str(found))
    print(f"\n{row.name}\n  floor {floor}\n  fsep  {found}")
    assert found.within(row.bound), f"{found} exceeds {row.bound}"
    assert found.within(floor.times(FLOOR_FACTOR)), f"{found} exceeds ten times {floor}"

    # With M microbatches 3·M exchanges of a layer in a step, or 2. Each pass of a repeated layer
    # has its own gradients, and passes restored weights on to one that follows at once.
    passes = 1 if STEP in row.fsep else row.accumulation
    in_layer = 1 if STEP in row.fsep else 2
    restores, reduces = row.exchanges or (row.moe_layers * in_layer, row.moe_layers)
    operations = 2 * row.accumulation * (1 + ("virtual pipeline" in row.name))
    assert len(fsep.probes) == row.steps
    if AT_HOME in row.fsep:  # a pass whose layout has no replica exchanges nothing
        for step, (left, restored, reduced) in enumerate(fsep.probes, start=1):
            assert left == 0 and reduced <= reduces * passes * step
            assert row.evaluations or restored <= restores * passes * step
        fetches = RANDOM in row.fsep and row.moe_layers > 0
        assert not fetches or all(restored > 0 for _, restored, _ in fsep.probes[-1:])
        return
    for step, (left, restored, reduced) in enumerate(fsep.probes, start=1):
        assert left == 0 and reduced == reduces * passes * step
        if not row.evaluations:  # evaluations restore experts as well
            # From the second step on, an operation may hand weights on to the one that follows.
            handed_on = (step - 1) * (0 if STEP in row.fsep else operations - 1)
            assert 0 <= restores * passes * step - restored <= handed_on
