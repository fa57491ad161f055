"""Megatron's own `pretrain_gpt.py`, unmodified, trains through `megatron_laer train` like ours.

Needs a checkout of Megatron-LM 0.19, whose folder MEGATRON_LM_CHECKOUT names: no wheel holds the
script.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.compare import identical
from tests.parity.flags import command_line
from tests.parity.training import train
from tests.ranks import RankPool

CHECKOUT = os.environ.get("MEGATRON_LM_CHECKOUT")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        CHECKOUT is None, reason="MEGATRON_LM_CHECKOUT names no checkout of Megatron-LM 0.19"
    ),
]

FSEP = " --expert-parallel-mode fsep --fsep-late-plan wait"


@pytest.mark.parametrize("mode", ["", FSEP], ids=["standard", "fsep"])
def test_megatrons_script_and_ours_are_bitwise_equal(
    ranks: Callable[[int], RankPool], text_data: str, mode: str
) -> None:
    assert CHECKOUT is not None
    script = Path(CHECKOUT) / "pretrain_gpt.py"
    flags = command_line(
        text_data, experts=8, expert_parallel=2, global_batch=8, steps=10, extra=mode
    )
    ours = ranks(2).run(train, flags)[0]
    theirs = ranks(2).run(train, flags, None, str(script))[0]
    assert len(theirs.losses) == 10
    assert identical(ours, theirs)
