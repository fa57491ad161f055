"""Bad input is refused on every rank before any training step, with a remedy."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from tests.parity.flags import command_line

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
def test_what_cannot_work_is_refused_on_every_rank(
    ranks: RankPools, text_data: str, case: str
) -> None:
    flags, *parts = CASES[case]
    for result in ranks(2).run_raw(train, command_line(text_data, flags, steps=1)):
        assert result.type_name == "RefusedError", result.traceback
        assert [part for part in parts if part not in result.message] == [], result.message


def test_fsep_without_experts_is_refused(ranks: RankPools, text_data: str) -> None:
    flags = command_line(text_data, FSEP, steps=1)
    at = flags.index("--num-experts")
    del flags[at : at + 2]
    for result in ranks(2).run_raw(train, flags):
        assert result.type_name == "RefusedError"
        assert "--num-experts" in result.message


def train_told(variables: dict[str, str], flags: list[str]) -> object:
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
    ranks: RankPools, text_data: str, variables: dict[str, str], quoted: str
) -> None:
    for result in ranks(2).run_raw(
        train_told, variables, command_line(text_data, FSEP, steps=1), timeout_s=60.0
    ):
        assert result.type_name == "RefusedError", result.traceback
        assert quoted in result.message and "torchrun" in result.message, result.message


def test_settings_in_megatrons_yaml_file_are_refused(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("num_experts: 8\nexpert_parallel_mode: fsep\nfsep_capacity: 5\n")
    flags = command_line(text_data, f" --yaml-cfg {file}", steps=1)
    for result in ranks(2).run_raw(train, flags, timeout_s=60.0):
        assert result.type_name == "RefusedError", result.traceback
        assert "expert_parallel_mode, fsep_capacity" in result.message, result.message
        assert "as flags" in result.message


def test_ranks_still_train_after_a_refusal(ranks: RankPools, text_data: str) -> None:
    record = ranks(2).run(train, command_line(text_data, FSEP, steps=1))[0]
    assert len(record.losses) == 1
