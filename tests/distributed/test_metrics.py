"""FSEP's metrics reach TensorBoard through Megatron's own writer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_laer.testing.ranks import RankPool
from megatron_laer.testing.training import train
from tests.documents import ROOT
from tests.parity.flags import command_line

STEPS = 6
ROW_BYTES = 48 * 4  # of a hidden state in fp32


@pytest.mark.parametrize(
    ("size", "flags"), [(2, ""), (4, " --pipeline-model-parallel-size 2")], ids=["flat", "pipeline"]
)
def test_balance_and_planning_are_in_tensorboard(
    ranks: Callable[[int], RankPool], text_data: str, tmp_path: Path, size: int, flags: str
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = command_line(
        text_data,
        experts=8,
        expert_parallel=2,
        global_batch=4,
        steps=STEPS,
        extra=" --expert-parallel-mode fsep --fsep-late-plan wait --log-interval 2"
        f" --tensorboard-dir {tmp_path}" + flags,
    )
    ranks(size).run(train, command)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for tag in events.Tags()["scalars"]:
        if "fsep" in tag:
            name = re.sub(r"_p\d+$|_layer_\d+$", "", tag.removeprefix("moe/"))
            assert f"`{name}`" in readme

    def series(name: str) -> list[float]:
        found = events.Scalars(name)
        assert [event.step for event in found] == [2, 4, 6]
        return [event.value for event in found]

    fsep, stock = series("fsep_load_imbalance"), series("fsep_stock_load_imbalance")
    assert all(1.0 <= value < 2.0 for value in fsep + stock)
    assert sum(fsep) < sum(stock)
    # Both layers, also where each pipeline stage has one of them.
    for layer in (0, 1):
        assert all(value >= 1.0 for value in series(f"moe/fsep_load_imbalance_layer_{layer}"))
    assert series("fsep_load_imbalance_p50") <= series("fsep_load_imbalance_p95")
    assert all(0 <= value <= 1 for value in series("fsep_fresh_layouts"))
    assert all(0 < value < 1e3 for value in series("fsep_quota_ms"))
    assert all(value > 0 for value in series("fsep_token_rows_intra_node"))
    assert series("fsep_token_rows_inter_node") == [0, 0, 0]  # a node has both ranks
    for rows, mb in zip(
        series("fsep_token_rows_intra_node"), series("fsep_token_mb_intra_node"), strict=True
    ):
        assert mb == pytest.approx(rows * ROW_BYTES / 1e6, rel=1e-5)
    assert series("fsep_token_mb_inter_node") == [0, 0, 0]
    assert series("fsep_layout_version") == [1, 3, 5]
    assert all(value > 0 for value in series("fsep_plan_ms"))
    assert series("fsep_late_plans") == series("fsep_plan_failures") == [0, 0, 0]
