"""Layers go to stock's placement while a run goes on: by a file, or after a finding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import Trainings
from tests.faults.at_stock import train_and_switch, train_on_after_damage, train_without_step
from tests.faults.wrong_weights import EVERY
from tests.parity.row import FSEP, HOMES
from tests.parity.rows import DIST_OPT, FULL_RECOMPUTE, RANDOM, STEP

FOUR: dict[str, Any] = {"size": 4, "expert_parallel": 4, "steps": 8}
AT_HOME = " --expert-parallel-mode fsep" + HOMES
# Ways to train, each of which changes layouts in these steps unless it is switched off.
MODES = {
    "experts at home": AT_HOME,
    "rows": FSEP,
    "fresh layouts": FSEP + " --fsep-plan-mode exact",
    "held over a step": AT_HOME + STEP + FULL_RECOMPUTE,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_file_switches_all_layers_to_stocks_placement_and_back(
    trained: Trainings, tmp_path: Path, mode: str
) -> None:
    flags, file = MODES[mode], tmp_path / "stock"
    stock = trained(**FOUR).losses
    unswitched = trained(flags, **FOUR).losses
    switched = f"{flags} --fsep-set stock_file={file}"
    # Made in step 1 and removed in step 4: a step later all ranks have seen it.
    ranks = trained.each(switched, str(file), [1, 4], by=train_and_switch, **FOUR)
    for losses, at_stock, restores in ranks:
        assert at_stock[3:6] == [True] * 3 and not all(at_stock[6:])
        if "home" in flags:
            assert restores[3:6] == [0] * 3
        for expected in (stock, unswitched):
            assert losses == pytest.approx(expected, rel=1e-5)
    assert [at_stock for _, at_stock, _ in ranks[1:]] == [ranks[0][1]] * 3
    # A file that is there at the start counts from the first step on.
    file.touch()
    _, at_stock, _ = trained(switched, str(file), [], by=train_and_switch, **FOUR)
    assert at_stock == [True] * 8


@pytest.mark.parametrize("more", ["", DIST_OPT], ids=["plain", "sharded optimizer"])
def test_after_a_finding_that_warns_a_run_goes_on_with_stocks_losses(
    trained: Trainings, tmp_path: Path, more: str
) -> None:
    flags = AT_HOME + RANDOM + " --fsep-set verify=all,warn" + more
    losses = trained(flags, 2, 3, "a lost row", str(tmp_path), by=train_on_after_damage, **FOUR)
    (dump,) = tmp_path.iterdir()
    with np.load(dump) as found:
        assert dump.name == "fsep-verify-2.npz" and found["step"] == 3
    stock = trained(more, 3, by=train_without_step, **FOUR)
    assert losses[:3] + losses[4:] == pytest.approx(stock[:3] + stock[4:], rel=1e-5)
    # With the step that was skipped stock's losses are others.
    assert losses[4] != pytest.approx(trained(more, **FOUR).losses[4], rel=1e-3)


def test_a_layer_that_stocks_placement_does_not_help_stops_the_run(
    trained: Trainings, tmp_path: Path
) -> None:
    """With experts by rows stock's placement restores too, and is damaged at each step."""
    flags = FSEP + RANDOM + " --fsep-set verify=all,warn"
    given = flags, 2, EVERY, "one bit", str(tmp_path)
    message = trained.refused(*given, by=train_on_after_damage, kind="VerificationError", **FOUR)
    assert "FSEP verify, step 1: layer 1, forward 1" in message and "Every rank stops" in message
