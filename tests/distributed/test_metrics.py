"""FSEP's metrics reach TensorBoard through Megatron's own writer."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_laer.telemetry.metrics import LOGGED, PERCENTILES
from megatron_laer.tools.report.metrics_recording import read_metrics
from tests.distributed.conftest import Trainings
from tests.parity.row import FSEP
from tests.parity.rows import PIPELINE, SCHEDULER_OFF

STEPS = 6
MICROBATCHES = 2
LAYERS, EXPERTS = 2, 8
ROW_BYTES = 48 * 4  # of a hidden state in fp32
EXPERT_BYTES = 3 * 48 * 64 * 4
# A restore in each direction and a reduce, of each layer and microbatch.
EXCHANGES = 3 * LAYERS * MICROBATCHES


@pytest.mark.parametrize(
    ("size", "flags"),
    [(2, ""), (2, SCHEDULER_OFF), (4, PIPELINE)],
    ids=["flat", "scheduler off", "pipeline"],
)
def test_balance_and_planning_are_in_tensorboard(
    trained: Trainings, tmp_path: Path, size: int, flags: str
) -> None:
    hides_nothing = flags == SCHEDULER_OFF
    flags += f" --log-interval 2 --tensorboard-dir {tmp_path}"
    flags += f" --fsep-record {tmp_path / 'recorded'} metrics"
    trained(f"{FSEP} --fsep-late-plan wait{flags}", size=size, steps=STEPS)
    events = events_of(tmp_path)
    tags = [tag for tag in events.Tags()["scalars"] if "fsep" in tag]
    names = {re.sub(r"_p\d+$|_layer_\d+$", "", tag.removeprefix("moe/")) for tag in tags}
    assert names == {metric.name for metric in LOGGED} - {"fsep_announcement_misses"}

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
    for name in ("fsep_load_imbalance", "fsep_stock_load_imbalance"):
        percentiles = [series(f"{name}_p{p}") for p in PERCENTILES]
        for low, high in pairwise(percentiles):
            assert all(one <= other for one, other in zip(low, high, strict=True))
    assert all(0 <= value < 9 for value in series("fsep_optimality_gap"))
    assert all(0.05 < value < 3 for value in series("fsep_share_of_forced_balance"))
    assert all(0 < value < 1e4 for value in series("fsep_predicted_layer_ms"))
    assert all(0 < value < 1e5 for value in series("fsep_layer_ms"))
    for name in ("fsep_restore_exposed_ms", "fsep_reduce_exposed_ms"):
        assert all(0 <= value < 1e5 for value in series(name))
        assert not hides_nothing or all(series(name)), name
    assert all(0 < value < 1e4 for value in series("fsep_memory_headroom_gib"))
    assert all(0 <= value <= 1 for value in series("fsep_fresh_layouts"))
    assert all(value > 0 for value in series("fsep_quota_ms"))
    assert all(value > 0 for value in series("fsep_token_rows_intra_node"))
    assert series("fsep_token_rows_inter_node") == [0, 0, 0]  # a node has both ranks
    for rows, mb in zip(
        series("fsep_token_rows_intra_node"), series("fsep_token_mb_intra_node"), strict=True
    ):
        assert mb == pytest.approx(rows * ROW_BYTES / 1e6, rel=1e-5)
    assert series("fsep_token_mb_inter_node") == [0, 0, 0]
    # Half of each slot's rows, as a layer is on two ranks; fresh layouts fetch more. Operations in
    # a row of one layer hand its weights on after the first step.
    halves_mb = (EXPERTS / 2 + 1) / 2 * EXCHANGES * 2 / size * EXPERT_BYTES / 1e6
    assert all(mb >= halves_mb / 3 for mb in series("fsep_weight_mb")), "gradients are reduced"
    assert series("fsep_replicas") == [1, 1, 1]
    assert series("fsep_passes_without_replicas") == [0, 0, 0]
    assert series("fsep_layout_version") == [1, 3, 5]
    assert all(value > 0 for value in series("fsep_plan_ms"))
    assert series("fsep_late_plans") == series("fsep_plan_failures") == [0, 0, 0]

    # One per group; with a pipeline each stage's group has one of the layers.
    recordings = [read_metrics(path) for path in sorted((tmp_path / "recorded").iterdir())]
    assert len(recordings) == size // 2
    assert sorted(name for one in recordings for name in one.shape.layers) == ["layer 1", "layer 2"]
    for recording in recordings:
        assert recording.steps_T.tolist() == list(range(STEPS))
        ((_, run),) = recording.runs
        known = run["layers"], run["sharers"], run["combined"]
        assert known == (str(LAYERS), "1", "False"), "of the whole model"
        of, steps = recording.of_layers, recording.of_steps
        assert (of["replicas"] == 1).all() and (of["without_replicas"] == 0).all()
        received_mb = recording.metrics["fsep_weight_mb"]
        assert received_mb == pytest.approx(steps["weight_bytes"] / 1e6, rel=1e-3)
        for what in ("restore", "reduce"):
            waited_ms = recording.metrics[f"fsep_{what}_exposed_ms"]
            assert waited_ms == pytest.approx(steps[f"{what}_wait_ms"], rel=1e-3)
        assert (of["passes"] == MICROBATCHES).all()
        assert (of["layer_ms"] > 0).all() and (of["bound_ms"] <= of["predicted_ms"]).all()
        assert (recording.rank_tokens_TLN.sum(axis=2) > 0).all()
        parts_ms = steps["dispatch_ms"] + steps["experts_ms"] + steps["combine_ms"]
        of_layers_ms = (of["layer_ms"] * of["passes"]).sum(axis=1)
        assert parts_ms == pytest.approx(of_layers_ms, rel=1e-2)
        assert (parts_ms < steps["step_ms"] * 1.01).all()
        assert (steps["version"] == range(STEPS)).all()


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events
