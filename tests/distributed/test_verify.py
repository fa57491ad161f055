"""`--fsep-set verify` finds restored experts that are not their owners', and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import Trainings
from tests.faults.wrong_weights import (
    DAMAGES,
    train_and_count_checks,
    train_with_damaged_slots,
    train_with_stale_slots,
)
from tests.parity.row import FSEP, HOMES
from tests.parity.rows import (
    BF16,
    BLOCKS,
    COMBINED,
    DELAYED,
    DIST_OPT,
    FULL_RECOMPUTE,
    MXFP8,
    PADDING,
    RANDOM,
    RELAYED,
    SCHEDULER_OFF,
    STEP,
)

ALL = " --fsep-set verify=all"
BY_NODES = " --fsep-node-size 2 --fsep-set restore_algorithm=node"
ROWS = FSEP + RANDOM
AT_HOME = " --expert-parallel-mode fsep" + RANDOM + HOMES
IN_FP8 = AT_HOME + " --fsep-allow-unproven fp8-experts"
IN_FP8_BLOCKS = IN_FP8 + BF16 + BLOCKS + PADDING
IN_FP8_BY_DIRECTION = IN_FP8 + MXFP8
# Flags of a run, and the name of its way.
WAYS = {
    "rows": (ROWS, "flat"),
    "rows by nodes": (ROWS + BY_NODES, "node"),
    "homes": (AT_HOME + " --fsep-set restore_algorithm=flat", "direct"),
    "homes by relay": (AT_HOME + BY_NODES, "relay"),
    "homes in fp8": (IN_FP8_BLOCKS, "direct"),
}
FOUR: dict[str, Any] = {"size": 4, "expert_parallel": 4}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_slot_stops_every_rank_before_the_optimizer(
    trained: Trainings, tmp_path: Path, way: str, damage: str
) -> None:
    flags, name = WAYS[way]
    given = flags + ALL, 2, 1, damage, str(tmp_path)
    message = trained.refused(*given, by=train_with_damaged_slots, kind="VerificationError", **FOUR)
    assert re.search(
        rf"FSEP verify, step 1: layer 1, forward 1 of the step, by way {name}: ", message
    )
    assert re.search(r": slot \d of rank 2 has other bits of matrix \d of 2 ", message)
    assert ("its home, rank" if "home" in way else "all ranks' rows") in message
    (dump,) = tmp_path.iterdir()
    assert dump.name == "fsep-verify-2.npz" and "fsep-verify-RANK.npz" in message
    with np.load(dump) as found:
        assert found["step"] == 1 and (found["slots_0"] != 0).any()


def test_slots_of_the_step_before_stop_every_rank(trained: Trainings, tmp_path: Path) -> None:
    static = FSEP + " --fsep-planner static" + ALL
    message = trained.refused(
        *(static, 1, 2, str(tmp_path)), by=train_with_stale_slots, kind="VerificationError", **FOUR
    )
    assert "FSEP verify, step 2: layer 1" in message and "of rank 1 has other bits" in message


# Runs whose weights are in use in other ways, and the compared restores of two steps, if not all.
RIGHT = {
    "rows": ROWS,
    "rows by nodes": ROWS + BY_NODES,
    "homes by relay": AT_HOME + BY_NODES,
    "homes by relay in nodes": "--expert-parallel-mode fsep" + RANDOM + RELAYED,
    "no overlap": ROWS + SCHEDULER_OFF,
    "recomputed": AT_HOME + FULL_RECOMPUTE,
    "fresh layouts": FSEP + " --fsep-plan-mode exact",
    "held over a step": ROWS + STEP + " --num-layers 3",
    "kept": ROWS + " --fsep-restore 1",
    "sharded optimizer": AT_HOME + DIST_OPT,
    "combined 1F1B": AT_HOME + BF16 + COMBINED + DELAYED,
    "fp8": IN_FP8_BLOCKS,
    "fp8 by direction, recomputed": IN_FP8_BY_DIRECTION + FULL_RECOMPUTE,
}


@pytest.mark.parametrize("case", RIGHT)
def test_right_runs_have_no_finding_and_other_digits_in_nothing(
    trained: Trainings, case: str
) -> None:
    plain, _, none = trained(RIGHT[case], by=train_and_count_checks, **FOUR)
    checked, restores, checks = trained(RIGHT[case] + ALL, by=train_and_count_checks, **FOUR)
    assert checked == plain and none == 0
    assert checks >= restores > 0
