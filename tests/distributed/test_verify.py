"""`--fsep-set verify` finds wrong weights, sums of gradients and tokens, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import Trainings
from tests.faults import wrong_gradients, wrong_tokens, wrong_weights
from tests.faults.wrong_weights import (
    train_and_count_checks,
    train_with_damaged_slots,
    train_with_stale_slots,
)
from tests.parity.row import FSEP, HOMES
from tests.parity.rows import (
    BF16,
    BLOCKS,
    COMBINED,
    DEEPEP,
    DELAYED,
    DIST_OPT,
    FULL_RECOMPUTE,
    HYBRIDEP,
    MXFP8,
    PADDING,
    RANDOM,
    RELAYED,
    SCHEDULER_OFF,
    STEP,
    TOKENS,
)

ALL, OFF = (f" --fsep-set verify={setting}" for setting in ("all", "off"))
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
# The same of tokens.
OF_TOKENS = {
    "by rank": (ROWS, "rank"),
    "by rank, fused": (ROWS + BF16 + " --moe-permute-fusion", "rank"),
    "by node": (AT_HOME + TOKENS.format(2), "node"),
    "DeepEP": (ROWS + DEEPEP, "flex"),
    "HybridEP in bf16": (AT_HOME + BF16 + HYBRIDEP, "flex"),
}
FOUR: dict[str, Any] = {"size": 4, "expert_parallel": 4}


@pytest.mark.parametrize("damage", wrong_weights.DAMAGES)
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


@pytest.mark.parametrize("damage", wrong_gradients.DAMAGES)
@pytest.mark.parametrize("way", WAYS)
def test_damaged_gradients_stop_every_rank_before_the_optimizer(
    trained: Trainings, tmp_path: Path, way: str, damage: str
) -> None:
    flags, name = WAYS[way]
    given = flags + ALL, 2, 2, damage, str(tmp_path)
    by = wrong_gradients.train_with_damaged_gradients
    message = trained.refused(*given, by=by, kind="VerificationError", **FOUR)
    assert re.search(
        rf"FSEP verify, step 2: layer \d, reduce 1 of the step, by way ({name}|relay): ", message
    )
    owner = r"its home, rank \d" if "home" in way else "all ranks' rows"
    found = re.search(
        r": the gradients of matrix \d of 2 \(\d+ x \d+\) of expert \d+ that "
        rf"{owner} added up are not those that its slots sent: (.*?)[;.]",
        message,
    )
    assert found
    for other, explanation in ("lost replica", "is missing"), ("doubled", "counts twice"):
        if other in damage:
            assert re.fullmatch(rf"slot \d of rank 2 {explanation}|all are missing", found[1])
    assert "before the optimizer's step" in message
    for dump in (dumps := [*tmp_path.iterdir()]):
        assert re.fullmatch(r"fsep-verify-\d.npz", dump.name)
    assert dumps


@pytest.mark.parametrize("way", WAYS)
def test_sums_that_come_late_stop_every_rank_before_the_optimizer(
    trained: Trainings, tmp_path: Path, way: str
) -> None:
    flags, name = WAYS[way]
    given = flags + ALL, 1, 1, str(tmp_path)
    by = wrong_gradients.train_with_late_sums
    message = trained.refused(*given, by=by, kind="VerificationError", **FOUR)
    assert re.search(
        rf"FSEP verify, step 1: layer \d, reduce 1 of the step, by way {name}: ", message
    )
    assert "before the optimizer's step" in message


@pytest.mark.parametrize("damage", wrong_tokens.DAMAGES)
@pytest.mark.parametrize("way", OF_TOKENS)
def test_damaged_tokens_stop_every_rank_before_the_optimizer(
    trained: Trainings, tmp_path: Path, way: str, damage: str
) -> None:
    flags, name = OF_TOKENS[way]
    given = flags + ALL, 2, 1, damage, "token_dispatch", str(tmp_path)
    by = wrong_tokens.train_with_damaged_tokens
    message = trained.refused(*given, by=by, kind="VerificationError", **FOUR)
    assert re.search(
        rf"FSEP verify, step 1: layer 1, dispatch 1 of the step, by way {name}: \d+ tokens of "
        r"expert \d+ that arrived in slot \d of rank \d(, slot \d of rank \d)* are not those that "
        "ranks sent",
        message,
    )
    assert re.search(r"slot \d of rank 2", message) and "before the optimizer's step" in message
    assert [*tmp_path.iterdir()]


@pytest.mark.parametrize("damage", [name for name in wrong_tokens.DAMAGES if name != "one bit"])
@pytest.mark.parametrize("way", OF_TOKENS)
def test_damaged_outputs_stop_every_rank_before_the_optimizer(
    trained: Trainings, tmp_path: Path, way: str, damage: str
) -> None:
    flags, name = OF_TOKENS[way]
    given = flags + ALL, 2, 2, damage, "token_combine", str(tmp_path)
    by = wrong_tokens.train_with_damaged_tokens
    message = trained.refused(*given, by=by, kind="VerificationError", **FOUR)
    assert re.search(
        rf"FSEP verify, step 2: layer 1, combine 1 of the step, by way {name}: outputs that "
        r"returned to tokens are not the sums of those that experts computed, in \d+ of 64 groups",
        message,
    )


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
    plain, _, _, none = trained(RIGHT[case] + OFF, by=train_and_count_checks, **FOUR)
    checked, *exchanges, checks = trained(RIGHT[case] + ALL, by=train_and_count_checks, **FOUR)
    assert checked == plain and none == 0
    assert min(exchanges) > 0 and checks >= sum(exchanges)
