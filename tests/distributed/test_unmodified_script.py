"""Megatron's own scripts, unmodified, train through `megatron_laer train` like ours.

Needs a checkout of the installed Megatron-LM in the folder MEGATRON_LM_CHECKOUT, since no wheel
holds the scripts. Megatron builds the checkout's dataset helper itself, with `make`, a compiler and
the `python3` in the PATH, which must be this one and have pybind11.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes
from tests.checkouts import checkout
from tests.distributed.conftest import Trainings
from tests.parity.compare import identical
from tests.parity.rows import HYBRID_MTP

_ROOT = Path(__file__).resolve().parents[2]

CHECKOUT, MARKS = checkout("MEGATRON_LM_CHECKOUT", "the installed Megatron-LM")
pytestmark = [*MARKS, pytest.mark.releases]

FSEP = " --expert-parallel-mode fsep --fsep-late-plan wait"
RANDOM = " --expert-parallel-mode fsep --fsep-planner random"
SCRIPTS = {"pretrain_gpt.py": "", "pretrain_hybrid.py": HYBRID_MTP}


@pytest.mark.parametrize("mode", ["", FSEP], ids=["standard", "fsep"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_megatrons_script_and_ours_are_bitwise_equal(
    trained: Trainings, script: str, mode: str
) -> None:
    flags = SCRIPTS[script] + mode
    ours = trained(flags, steps=10)
    theirs = trained(flags, None, str(CHECKOUT / script), steps=10)
    assert len(theirs.losses) == 10
    assert identical(ours, theirs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_checkouts_own_megatron_trains_like_the_wheel(
    trained: Trainings, tmp_path: Path, script: str
) -> None:
    """Start as a user does: ranks of the other tests import the wheel's Megatron first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = trained.flags(SCRIPTS[script] + FSEP + " --log-interval 1", steps=10)

    def scalars(name: str, command: list[str]) -> dict[str, list[tuple[int, float]]]:
        folder = tmp_path / name
        launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
        processes.python(*launcher, *command, *flags, "--tensorboard-dir", folder)
        events = EventAccumulator(str(folder))
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in ("lm loss", "grad-norm", "fsep_load_imbalance")
        }

    ours = scalars("ours", [str(_ROOT / "pretrain_gpt.py")])
    theirs_script = str(CHECKOUT / script)
    theirs = scalars("theirs", ["-m", "megatron_laer", "train", theirs_script, "--"])
    assert len(ours["lm loss"]) == 10
    assert theirs == ours
