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

# One case of each kind, by the place of its check; `tests/unit/test_refusals.py` has every row of
# the table, `tests/bad_inputs` the settings of FSEP. Flags, then parts of the message.
CASES = {
    "rows of the table": (
        "--fp8-format e4m3 --cuda-graph-impl local --moe-paged-stash",
        "cannot run: (1) --fp8-format e4m3: nobody has run it",
        "(2) --cuda-graph-impl local",
        "--recompute-modules moe saves the same memory (it is speed-only)",
    ),
    "sizes": (
        "--fsep-capacity 9 --fsep-node-size 3",
        "use 4 to 8 (default 5)",
        "--fsep-node-size 3 does not divide the 2 ranks; use one of [1, 2]",
    ),
    "field": ("--fsep-set plan_lag=0", "--fsep-set plan_lag=0", "at least 1"),
    "planner": (
        "--fsep-planner magic",
        "magic",
        "greedy, laer, laer-even, laer-proportional, random, static",
    ),
    "cluster": ("--fsep-planner laer --fsep-set cluster=moon", "'moon'", "cpu-gloo"),
    "folder": ("--fsep-record /proc/x trace", "'/proc/x'", "a folder that can be written"),
    "no effect": ("--fsep-planner static --fsep-set plan_lag=2", "plan_lag=2", "no effect"),
    "deterministic": (
        "--deterministic-mode --fsep-late-plan keep",
        "--fsep-late-plan keep",
        "remove one of them",
    ),
    "deprecated flag": ("--enable-cuda-graph", "--enable-cuda-graph", "none"),
    "two settings": (
        "--fsep-token-exchange node --moe-token-dispatcher-type flex",
        "--fsep-token-exchange node with --moe-token-dispatcher-type flex",
        "leave out one of them",
    ),
    "yaml": ("--yaml-cfg x.yaml", "--yaml-cfg", "no effect"),
}


def commands(data: str, extra: str) -> list[str]:
    return command_line(data, extra, steps=1)


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_on_every_rank(
    ranks: RankPools, text_data: str, case: str
) -> None:
    flags, *parts = CASES[case]
    for result in ranks(2).run_raw(train, commands(text_data, f"{FSEP} {flags}")):
        assert result.type_name == "RefusedError", result.traceback
        assert [part for part in parts if part not in result.message] == [], result.message


def test_fsep_without_experts_is_refused(ranks: RankPools, text_data: str) -> None:
    flags = commands(text_data, FSEP)
    at = flags.index("--num-experts")
    del flags[at : at + 2]
    for result in ranks(2).run_raw(train, flags):
        assert result.type_name == "RefusedError"
        assert "--num-experts" in result.message


def test_an_fsep_flag_without_the_mode_is_refused(ranks: RankPools, text_data: str) -> None:
    for result in ranks(2).run_raw(train, commands(text_data, " --fsep-capacity 5")):
        assert result.type_name == "RefusedError"
        assert "--fsep-capacity 5" in result.message
        assert "--expert-parallel-mode fsep" in result.message


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
        train_told, variables, commands(text_data, FSEP), timeout_s=60.0
    ):
        assert result.type_name == "RefusedError", result.traceback
        assert quoted in result.message and "torchrun" in result.message, result.message


def test_settings_in_megatrons_yaml_file_are_refused(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("num_experts: 8\nexpert_parallel_mode: fsep\nfsep_capacity: 5\n")
    flags = commands(text_data, f" --yaml-cfg {file}")
    for result in ranks(2).run_raw(train, flags, timeout_s=60.0):
        assert result.type_name == "RefusedError", result.traceback
        assert "expert_parallel_mode, fsep_capacity" in result.message, result.message
        assert "as flags" in result.message


def test_the_mode_alone_is_as_good_as_with_what_it_needs(ranks: RankPools, text_data: str) -> None:
    needed = "--moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1"
    alone, given = (
        ranks(2).run(
            train,
            command_line(
                text_data,
                f"--expert-parallel-mode fsep --fsep-late-plan wait {extra}",
                steps=3,
                without=needed,
            ),
        )[0]
        for extra in ("", needed)
    )
    assert len(alone.losses) == 3
    assert (alone.losses, alone.grad_norms) == (given.losses, given.grad_norms)


@pytest.mark.parametrize("flag", ["--fim-data", "--dataloader-inter-document-masking"])
def test_our_script_refuses_what_only_megatrons_script_does(
    ranks: RankPools, text_data: str, flag: str
) -> None:
    for result in ranks(2).run_raw(train, commands(text_data, f" {flag}")):
        assert result.type_name == "RefusedError", result.traceback
        assert flag in result.message
        assert "megatron_laer train" in result.message


def test_ranks_still_train_after_a_refusal(ranks: RankPools, text_data: str) -> None:
    record = ranks(2).run(train, commands(text_data, FSEP))[0]
    assert len(record.losses) == 1
