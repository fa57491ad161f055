"""Bad input is refused on every rank before any training step, with a remedy."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_laer.cpu.training import train
from tests.distributed.conftest import Trainings

FSEP = " --expert-parallel-mode fsep"

# One case of each place of a check. `tests/unit/test_refusals.py` has every row of the table, and
# `tests/bad_inputs` the settings of FSEP. Flags, then parts of the message.
CASES = {
    "rows of the table": (
        f"{FSEP} --fp8-format e4m3 --cuda-graph-impl local --moe-paged-stash",
        "cannot run: (1) --fp8-format e4m3: nobody has run it",
        "(2) --cuda-graph-impl local",
        "--recompute-modules moe saves the same memory (it is speed-only)",
    ),
    "sizes": (
        f"{FSEP} --fsep-capacity 9 --fsep-node-size 3",
        "use 4 to 8 (default 5)",
        "--fsep-node-size 3 does not divide the 2 ranks; use one of [1, 2]",
    ),
    "sizes of homes": (f"{FSEP} --fsep-sharding experts --fsep-capacity 9", "use 5 to 8"),
    "deprecated flag": (f"{FSEP} --enable-cuda-graph", "--enable-cuda-graph", "none"),
    "two settings": (
        f"{FSEP} --fsep-token-exchange node --moe-token-dispatcher-type flex",
        "--fsep-token-exchange node with --moe-token-dispatcher-type flex",
        "leave out one of them",
    ),
    "yaml": (f"{FSEP} --yaml-cfg x.yaml", "--yaml-cfg", "no effect"),
    "without the mode": (
        "--fsep-capacity 5",
        "--fsep-capacity 5",
        "--expert-parallel-mode fsep",
    ),
    "of Megatron's script": ("--fim-data", "--fim-data", "megatron_laer train"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_on_every_rank(trained: Trainings, case: str) -> None:
    flags, *parts = CASES[case]
    message = trained.refused(flags, steps=1)
    assert [part for part in parts if part not in message] == [], message


def train_told(flags: list[str], variables: dict[str, str]) -> object:
    with mock.patch.dict(os.environ, variables):
        return train(flags)


@pytest.mark.parametrize(
    ("variables", "quoted"),
    [
        # `tests/bad_inputs` has the others.
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE='abc'"),
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
    ],
)
def test_what_a_launcher_cannot_mean_is_refused_on_every_rank(
    trained: Trainings, variables: dict[str, str], quoted: str
) -> None:
    message = trained.refused(FSEP, variables, by=train_told, steps=1)
    assert quoted in message and "torchrun" in message, message


def test_settings_in_megatrons_yaml_file_are_refused(trained: Trainings, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("num_experts: 8\nexpert_parallel_mode: fsep\nfsep_capacity: 5\n")
    message = trained.refused(f" --yaml-cfg {file}", steps=1)
    assert "expert_parallel_mode, fsep_capacity" in message and "as flags" in message, message
