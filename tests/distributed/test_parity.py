"""FSEP equals stock Megatron: losses, gradient norms, gradients and weights, for every layout.

Each row of `ROWS` is one combination. Stock and FSEP start from the same weights and train in
Megatron's own loop; FSEP gets a new random layout at every microbatch. The distance between two
stock runs with different expert placement is the noise floor of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Adapt, Record
from tests import entered
from tests.parity.compare import Distance, distance
from tests.parity.daily import Case, cases, features
from tests.parity.exact_sums import train_exactly
from tests.parity.replay import train_row
from tests.parity.report import read_figures
from tests.parity.row import (
    AT_HOME,
    FLOOR_FACTOR,
    LONG,
    SMALLEST_FLOOR,
    STEPS,
    STEPS_BY_DAY,
    Row,
)
from tests.parity.rows import ALL_ROWS, RANDOM, ROWS, STEP
from tests.parity.stock import SOURCES, StockRuns
from tests.releases import refused_flags


def left_and_done(model: Iterable[torch.nn.Module]) -> tuple[int, int, int, int]:
    """Return a step's plans that are left, restores and reduces so far, and the MoE layers."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_laer.session import current_coordinator

    coordinator = current_coordinator()
    if coordinator is None:  # a stage without MoE layers
        return 0, 0, 0, 0
    left = sum(len(layer.reruns) for layer in coordinator.layers)
    count = coordinator.streams.exchange.count
    parts = (part for chunk in model for part in chunk.modules())
    return left, count.restores, count.reduces, sum(isinstance(part, MoELayer) for part in parts)


def files_that_run(flags: list[str], adapt: Adapt | None) -> set[str]:
    """Train, and return the files of this project whose functions ran."""
    with entered.recorded() as functions:
        train_row(flags, None, adapt)
    return {name.partition(":")[0] for name in functions}


@pytest.fixture(scope="module")
def stock(ranks: RankPools, text_data: str, kept: Path) -> StockRuns:
    return StockRuns(ranks, text_data, kept)


@pytest.fixture(scope="module")
def refused() -> dict[str, str]:
    return refused_flags([row.flags for row in ALL_ROWS])


def parameter(case: Case) -> object:
    releases = [pytest.mark.releases] if case.is_daily and case.row.releases else []
    marks = releases if case.is_daily else [pytest.mark.nightly]
    return pytest.param(case.row, id=case.id, marks=marks)


@pytest.mark.parametrize("row", [parameter(case) for case in cases()])
def test_fsep_equals_stock(
    row: Row,
    refused: dict[str, str],
    ranks: RankPools,
    stock: StockRuns,
    text_data: str,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:
    if row.flags in refused:
        assert not row.releases, "the page says that the oldest Megatron runs this row"
        pytest.skip(refused[row.flags])
    reference = stock(*row.reference(text_data), row.adapt)
    size, command = row.fsep_run(text_data)
    run = train_exactly if row.exact else train_row
    fsep: Record = ranks(size).run(run, command, left_and_done, row.adapt)[0]

    assert len(fsep.losses) == row.steps and len(fsep.eval_losses) == row.evaluations
    assert bool(fsep.first_grads) == row.gradients
    logged = any(max(values) > 0.0 for values in fsep.moe_losses.values())
    assert logged == ("--moe-aux-loss-coeff" in row.flags)
    if row.steps:
        falls = 0.8 if row.steps >= LONG else 0.95 if row.steps >= STEPS else 0.98
        assert fsep.losses[-1] < falls * fsep.losses[0], "must learn, or little is compared"
    found = distance(fsep, reference)
    floor = Distance(*(SMALLEST_FLOOR,) * len(found.parts()))
    # Every floor is at least this one. By day the page's floor may serve too, where a row is within
    # twice of it. Otherwise, or for the page's figures, the floor is measured.
    if not found.within(floor.times(FLOOR_FACTOR)) and row.steps <= STEPS_BY_DAY:
        last = floor_on_page(row)
        floor = last if found.within(last.times(2)) else floor
    if not found.within(floor.times(FLOOR_FACTOR)) or pytestconfig.getoption("xmlpath"):
        other = stock(*row.other_stock(text_data), row.adapt)
        floor = distance(other, reference).at_least(SMALLEST_FLOOR)
    if row in ALL_ROWS:  # the page of supported settings has the figures of whole rows
        record_property("row", row.id)
    record_property("floor", str(floor))
    record_property("fsep", str(found))
    print(f"\n{row.id}\n  floor {floor}\n  fsep  {found}")
    assert found.within(row.bound), f"{found} exceeds {row.bound}"
    assert found.within(floor.times(FLOOR_FACTOR)), f"{found} exceeds ten times {floor}"

    # With M microbatches 3·M exchanges of a layer in a step, or 2. Each pass of a repeated layer
    # has its own gradients, and passes restored weights on to one that follows at once.
    passes = 1 if STEP in row.fsep else row.accumulation
    in_layer = 1 if STEP in row.fsep else 2
    operations = 2 * row.accumulation * (1 + ("virtual pipeline" in features(row)))
    assert len(fsep.probes) == row.steps
    for step, (left, restored, reduced, layers) in enumerate(fsep.probes, start=1):
        restores, reduces = row.exchanges or (layers * in_layer, layers)
        assert left == 0
        if AT_HOME in row.fsep:  # a pass whose layout has no replica exchanges nothing
            assert reduced <= reduces * passes * step
            assert row.evaluations or restored <= restores * passes * step
            assert restored > 0 or step < row.steps or RANDOM not in row.fsep or not layers
            continue
        assert reduced == reduces * passes * step
        if not row.evaluations:  # evaluations restore experts as well
            # From the second step on, an operation may hand weights on to the one that follows.
            handed_on = (step - 1) * (0 if STEP in row.fsep else operations - 1)
            assert 0 <= restores * passes * step - restored <= handed_on


def floor_on_page(row: Row) -> Distance:
    """Return the row's last measured floor; the smallest one where it has none."""
    floors = read_figures().get(row.id, [])[1::2] or [""] * len(fields(Distance))
    return Distance(*(float(floor or 0.0) for floor in floors)).at_least(SMALLEST_FLOOR)


# Folders of FSEP, and of tests.
FSEP_PARTS = ("layer", "runtime", "telemetry", "integrations")


@pytest.mark.parametrize("name", ["dense-first", "fp8-flex", "lora"])
def test_a_stock_run_runs_nothing_of_fsep(name: str, ranks: RankPools, text_data: str) -> None:
    """So records that are kept need not be made again when FSEP changes."""
    (row,) = (replace(row, steps=1) for row in ROWS if row.id == name)
    size, command = row.reference(text_data)
    ran: set[str] = ranks(size).run(files_that_run, command, row.adapt)[0]
    assert {"pretrain_gpt.py", "megatron_laer/cpu/training.py"} <= ran
    others = [file for file in ran if not file.startswith(SOURCES)]
    assert [file for file in others if file.split("/")[1] in FSEP_PARTS] == []
    assert [file for file in others if file.startswith("tests/")] == []
