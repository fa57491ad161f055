"""Bytes of a rank by setting, measured and by the formula of docs/settings.md."""

from __future__ import annotations

import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.rules import STRATEGIES
from tests.measured_memory import RANKS, SETTINGS, Setting, both, measure
from tests.parity.rows import DIST_OPT


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in STRATEGIES[:-1] else [])
        for name in SETTINGS
    ],
)
def test_a_ranks_bytes_are_those_of_the_formula(
    ranks: RankPools, text_data: str, name: str
) -> None:
    setting = SETTINGS[name]
    results = ranks(RANKS).run(measure, setting.command(text_data), setting.adapt)
    expected, measured = both(setting, results)
    # A shard has whole rows, so that some ranks have fewer; buckets are padded.
    assert measured[:5] == pytest.approx(expected[:5], rel=0.005)
    if expected.kept is not None:
        assert measured.kept == pytest.approx(expected.kept, rel=0.05)


@pytest.mark.parametrize("strategy", [None, STRATEGIES[-1]])
def test_expert_data_parallel_ranks_share_optimizer_state(
    ranks: RankPools, text_data: str, strategy: str | None
) -> None:
    setting = Setting(DIST_OPT if strategy is None else " ", strategy=strategy)
    results = ranks(4).run(measure, setting.command(text_data, 4))
    expected, measured = both(setting, results, 4)
    assert measured[:5] == pytest.approx(expected[:5], rel=0.005)
    assert expected.optimizer < both(setting, results)[0].optimizer * 0.6
