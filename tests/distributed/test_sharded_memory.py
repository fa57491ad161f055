"""Bytes of a rank by setting, measured and by the formula of docs/memory.md."""

from __future__ import annotations

import csv

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.rules import STRATEGIES
from tests.measured_memory import FIGURES, RANKS, SETTINGS, Setting, both, cells, measure
from tests.parity.rows import DIST_OPT


def test_the_page_has_a_line_for_each_setting() -> None:
    with FIGURES.open(newline="", encoding="utf-8") as file:
        assert [line[0] for line in csv.reader(file)] == [setting.name for setting in SETTINGS]


# One of each kind each day; the schedule's and recompute's buffers are in test_memory.py too.
DAILY = (
    "experts at home, DDP",
    "with `--use-distributed-optimizer`",
    "rows of experts instead",
    f"Megatron-FSDP, `{STRATEGIES[-1]}`",
    "one layer of `--fsep-restore GIB`",
    "full recompute, LoRA of rank 4 on experts",
)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(one, id=one.name, marks=[] if one.name in DAILY else pytest.mark.nightly)
        for one in SETTINGS
    ],
)
def test_a_ranks_bytes_are_those_of_the_formula_and_of_the_page(
    ranks: RankPools, text_data: str, setting: Setting
) -> None:
    results = ranks(RANKS).run(measure, setting.command(text_data), setting.adapt)
    expected, measured = both(setting, results)
    # A shard has whole rows, so that some ranks have fewer; buckets are padded.
    assert measured[:5] == pytest.approx(expected[:5], rel=0.005)
    if expected.kept is not None:
        assert measured.kept == pytest.approx(expected.kept, rel=0.05)
    with FIGURES.open(newline="", encoding="utf-8") as file:
        (line,) = (line for line in csv.reader(file) if line[0] == setting.name)
    assert line[1:6] == cells(expected, measured)[:5], "run python -m tests.measured_memory"
    # Tokens that a rank computes depend on the drawn layouts.
    assert float(line[6].split("/")[-1]) == pytest.approx(measured.kept / 1024, rel=0.1)


@pytest.mark.parametrize("strategy", [None, STRATEGIES[-1]])
def test_expert_data_parallel_ranks_share_optimizer_state(
    ranks: RankPools, text_data: str, strategy: str | None
) -> None:
    setting = Setting("", DIST_OPT if strategy is None else " ", strategy=strategy)
    results = ranks(4).run(measure, setting.command(text_data, 4))
    expected, measured = both(setting, results, 4)
    assert measured[:5] == pytest.approx(expected[:5], rel=0.005)
    assert expected.optimizer < both(setting, results)[0].optimizer * 0.6
