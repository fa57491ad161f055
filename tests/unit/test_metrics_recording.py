"""Recorded metrics of a run are read back unchanged, and damaged ones are refused."""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_laer import life, telemetry
from megatron_laer.choices import (
    Dispatch,
    ExchangeAlgorithm,
    Recompute,
    Sharding,
)
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean, stock_tokens_N
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.outcome import PRICES, Outcome, price
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.planner.token_prices import TokenPrices
from megatron_laer.precision import Precision
from megatron_laer.runtime.metrics_recorder import MetricsRecorder, run_settings
from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.metrics import (
    LOGGED,
    PERCENTILES,
    RECORDED_OF_LAYERS,
    RECORDED_OF_STEPS,
    is_in_line,
)
from megatron_laer.telemetry.metrics_file import METRICS, MetricsWriter, Shape
from megatron_laer.telemetry.statistics import (
    LayerMetrics,
    LayerPasses,
    RankMetrics,
    named,
)
from megatron_laer.telemetry.step_times import STEP, StepTimes
from megatron_laer.tools.report.metrics_recording import read_metrics
from tests.documents import ROOT
from tests.recorded_runs import (
    COSTS,
    GEOMETRY,
    GUARD,
    LAYERS,
    MICROBATCHES,
    RECEIVED_BYTES,
    RUN,
    STEPS,
    TICK_MS,
    TickingClock,
    counts_NE,
    record_run,
)
from tests.unit.planner_cases import with_holes


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    record_run(tmp_path)
    return METRICS.path(tmp_path, 0)


def test_what_was_decided_is_read_back(recorded: Path) -> None:
    recording = read_metrics(recorded)
    assert recording.shape.layers == LAYERS
    assert recording.runs == ((0, RUN),)
    assert recording.clusters == (COSTS.cluster,)
    assert recording.steps_T.tolist() == list(range(STEPS))
    for step, layer in np.ndindex(STEPS, len(LAYERS)):
        counts = [counts_NE(step, layer, microbatch) for microbatch in range(MICROBATCHES)]
        ratios = [max_over_mean(stock_tokens_N(of_one)) for of_one in counts]
        found = recording.of_layers["stock_max_over_mean"][step, layer]
        assert found == pytest.approx(np.mean(ratios), rel=1e-3)
        tokens_N = recording.rank_tokens_TLN[step, layer]
        assert tokens_N.sum() == sum(int(of_one.sum()) for of_one in counts)
        least = -(-int(counts[0].sum()) // 4)
        assert recording.of_layers["least_tokens"][step, layer] == least
        assert recording.of_layers["largest_tokens"][step, layer] >= least
    of = recording.of_layers
    assert (of["passes"] == MICROBATCHES).all()
    assert (of["replicas"] == 1).all() and (of["without_replicas"] == 0).all()
    received_bytes = RECEIVED_BYTES * np.arange(STEPS)
    assert recording.of_steps["weight_bytes"] == pytest.approx(received_bytes, rel=1e-3)
    assert recording.metrics["fsep_weight_mb"] == pytest.approx(received_bytes / 1e6, rel=1e-3)
    assert (of["bound_ms"] <= of["predicted_ms"]).all()
    assert (of["max_over_mean"] <= of["stock_max_over_mean"] + 1e-3).all()


def test_a_runs_cost_model_can_be_made_from_its_recording(tmp_path: Path) -> None:
    costs = replace(
        COSTS,
        recompute=Recompute.FULL,
        restore_algorithm=ExchangeAlgorithm.NODE,
        tokens=TokenPrices(Dispatch.NODE, 0.1 + 0.2, 1 / 3),
        precision=Precision.BLOCKWISE,
        layers=12,
        sharers=4,
        kinds=frozenset({life.Kind.PARTS}),
    )
    priced = {"top_k": 2, "tokens_per_rank": 4096}
    config = FSEPConfig(sharding=Sharding.ROWS)
    record_run(tmp_path, run=run_settings(config, costs, priced, torch.device("cpu")))
    recording = read_metrics(METRICS.path(tmp_path, 0))
    ((_, run),) = recording.runs
    assert recording.clusters == (costs.cluster,)
    sizes = ("hidden", "ffn", "gated", "bytes_per_element")
    for name in (*sizes, "recompute", "restore_algorithm", "precision", "layers", "sharers"):
        assert run[name] == str(getattr(costs, name))
    assert run["combined"] == "True"
    assert run["token_exchange"] == costs.tokens.dispatch
    rows = [float(run[f"token_{link}_rows"]) for link in ("intra", "inter")]
    assert rows == [costs.tokens.intra_rows, costs.tokens.inter_rows], "to the last digit"
    assert {name: int(run[name]) for name in priced} == priced
    assert int(run["prices"]) == PRICES


def test_times_are_those_between_exchanges(recorded: Path) -> None:
    """In each pass the clock is read at both edges of two exchanges."""
    recording = read_metrics(recorded)
    passes = len(LAYERS) * MICROBATCHES
    for kind in ("dispatch_ms", "experts_ms", "combine_ms"):
        assert recording.of_steps[kind] == pytest.approx(passes * TICK_MS)
    assert recording.of_layers["layer_ms"] == pytest.approx(3 * TICK_MS)
    # Between the step's start and end it is read once more.
    assert recording.of_steps["step_ms"] == pytest.approx((4 * passes + 1) * TICK_MS)
    assert recording.of_steps["decide_ms"] == pytest.approx(passes * 1.0)
    assert recording.of_steps["plan_ms"] == pytest.approx(0.5)


def test_recorded_metrics_have_the_names_of_logged_ones(recorded: Path) -> None:
    metrics = read_metrics(recorded).metrics
    known = {metric.name for metric in LOGGED}
    known |= {f"{m.name}_p{p}" for m in LOGGED if m.over_layers for p in PERCENTILES}
    assert set(metrics) <= known
    imbalance = [metrics[f"fsep_stock_load_imbalance_p{p}"] for p in PERCENTILES]
    assert (imbalance[0] <= imbalance[1]).all() and (imbalance[1] <= imbalance[2]).all()
    assert (metrics["fsep_optimality_gap"] >= 0).all()
    assert (metrics["fsep_share_of_forced_balance"] > 0.3).all()


def test_unquantised_layers_are_predicted_at_the_prices_of_bf16(tmp_path: Path) -> None:
    cluster = replace(COSTS.cluster, gemm_fp8=COSTS.cluster.gemm.times(2.0))
    in_fp8 = replace(GUARD, costs=replace(COSTS, cluster=cluster, precision=Precision.MXFP8))
    path = METRICS.path(tmp_path, 0)
    writer = MetricsWriter(path, Shape(4, 8, 3, 2, LAYERS), RUN, 0, COSTS.cluster)
    recorder = MetricsRecorder(in_fp8, torch.device("cpu"), TickingClock())
    recorder.open(writer, LAYERS, unquantised={1})
    decision = in_fp8.decide(counts_NE(0, 0, 0), ExpertLayout.static(4, 3, 8))
    recorder.begin_step(0)
    for layer in range(len(LAYERS)):
        recorder.add(layer, Outcome(decision, 1e-3))
    recorder.end_step(PlannerStatus(), 0, received_bytes=0, verified=0)
    recorder.close()
    expected_s = [price(guard, Outcome(decision)).layer_s for guard in (in_fp8, GUARD)]
    (found_L,) = read_metrics(path).of_layers["predicted_ms"]
    assert found_L.tolist() == pytest.approx([1e3 * seconds for seconds in expected_s], rel=1e-3)
    assert expected_s[0] < expected_s[1]


@pytest.mark.parametrize("broken", ["price", "MetricsWriter.append"])
def test_a_recording_that_ended_keeps_nothing_of_later_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    path = METRICS.path(tmp_path, 0)
    writer = MetricsWriter(path, Shape(4, 8, 3, 2, LAYERS), RUN, 0, COSTS.cluster)
    recorder = MetricsRecorder(GUARD, torch.device("cpu"), TickingClock())
    recorder.open(writer, LAYERS)
    decision = GUARD.decide(counts_NE(0, 0, 0), ExpertLayout.static(4, 3, 8))
    with mock.patch(f"{MetricsRecorder.__module__}.{broken}", side_effect=OSError("no space")):
        for step in range(3):
            recorder.begin_step(step)
            recorder.add(0, Outcome(decision, 1e-3))
            recorder.end_step(PlannerStatus(), step, received_bytes=0, verified=0)
    assert caplog.text.count("the recording of metrics ends at step 0: no space") == 1
    assert recorder.times is None
    recorder.close()
    assert len(read_metrics(path).steps_T) == 0


DISPATCH = Activity(Kind.DISPATCH, "layer 1")
WAIT = Activity(Kind.RESTORE, "layer 1", waits=True)


def test_exchanges_phases_and_waits_add_up_within_a_step() -> None:
    times = StepTimes(TickingClock())
    times.begin_exchange(DISPATCH)  # nothing is measured between steps
    times.add(WAIT, 0.0, 1.0)
    times.begin_step()
    times.begin_exchange(DISPATCH)
    times.end_exchange(Activity(Kind.EXPERTS, "layer 1"))
    times.add(WAIT, 1.0, 1.5)
    assert times.take() is None
    times.end_step()
    found = times.take()
    assert found is not None
    assert found[WAIT] == 0.5
    assert set(found) == {STEP, DISPATCH, WAIT}


def test_the_last_phase_of_a_step_is_no_part_of_the_next() -> None:
    times = StepTimes(TickingClock())
    for _ in range(2):
        times.begin_step()
        times.begin_exchange(DISPATCH)
        times.end_exchange(Activity(Kind.EXPERTS, "layer 1"))
        times.end_step()
        found = times.take()
        assert found is not None and set(found) == {STEP, DISPATCH}


def test_a_timed_exchange_leaves_missing_gradients_missing() -> None:
    from megatron_laer.layer.dispatch.slot_dispatch import _Edge

    sent = [torch.ones(3, requires_grad=True) for _ in range(2)]
    called = mock.Mock()
    tokens, _ = _Edge.apply(called.forward, called.backward, *sent)
    tokens.sum().backward()
    assert [call[0] for call in called.mock_calls] == ["forward", "backward"]
    assert sent[0].grad is not None and sent[1].grad is None


def test_passes_add_up_and_what_was_weighed_is_averaged() -> None:
    planned, ranks = ExpertLayout.static(4, 3, 8), GEOMETRY.num_ranks
    counts = [counts_NE(0, 0, microbatch) for microbatch in range(3)]
    counts[1] //= 8
    for of_one in counts:
        of_one[0, 0] += 1  # so that no mean is a whole number
    decisions = [GUARD.decide(of_one, planned) for of_one in counts]
    assert [decision.replanned for decision in decisions] == [True, False, True]
    passes = LayerPasses.of(ranks)
    for decision in decisions:
        passes.add(Outcome(decision))

    tokens = [fsep_tokens_N(decision.quotas) for decision in decisions]
    assert passes.rank_tokens_N.tolist() == sum(tokens).tolist()
    largest = max(tokens, key=max)
    assert passes.values() == {
        "passes": 3,
        "fresh": 2,
        "changed_slots": decisions[0].changed_slots + decisions[2].changed_slots,
        "largest_tokens": max(largest),
        "least_tokens": -(-sum(largest) // ranks),
        "max_over_mean": mean(max_over_mean(of) for of in tokens),
        "stock_max_over_mean": mean(max_over_mean(stock_tokens_N(of)) for of in counts),
        "gain_ms": mean(1e3 * of.gain_s for of in decisions),
        "cost_ms": mean(1e3 * of.cost_s for of in decisions),
        "replicas": 1.0,
        "without_replicas": 0,
    }


def test_replicas_are_counted_per_rank_and_passes_without_them() -> None:
    static = ExpertLayout.static(*GEOMETRY.shape)
    layouts = [ExpertLayout.at_home(*GEOMETRY.shape), with_holes(static, 1.0, 0), static]
    decision = GUARD.decide(counts_NE(0, 0, 0), static)
    passes = LayerPasses.of(
        GEOMETRY.num_ranks, [Outcome(replace(decision, layout=one)) for one in layouts]
    )
    assert passes.values()["replicas"] == pytest.approx(1 / 3)
    assert passes.values()["without_replicas"] == 2
    found, _ = named([LayerMetrics.of(passes, price(GUARD, Outcome(decision)))], RankMetrics())
    assert found["fsep_replicas"] == pytest.approx(1 / 3)
    assert found["fsep_passes_without_replicas"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("numbers", "rows"),
    [((1, 3), [0, 2]), ((2, -1), [1, 3]), ((3, -2), [2, 4]), ((1, -3), [0, 4])],
)
def test_a_layers_metrics_are_logged_under_its_number(
    numbers: tuple[int, ...], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative numbers are of MTP layers, behind three others; the last row has any further one."""
    from megatron_laer.plugin import metrics_tracker

    outcome = Outcome(GUARD.decide(counts_NE(0, 0, 0), ExpertLayout.static(*GEOMETRY.shape)))
    layers = [
        mock.Mock(number=abs(number), is_mtp=number < 0, index=at)
        for at, number in enumerate(numbers)
    ]
    for layer in layers:
        layer.statistics.take_sent.return_value = np.zeros(5)
        layer.statistics.take_outcomes.return_value = [outcome]
    coordinator = mock.MagicMock(geometry=GEOMETRY, layers=layers)
    coordinator.take_exchanged.return_value = (0.0, 0.0, 0.0)
    coordinator.recorder.take_layer_ms.return_value = None
    coordinator.layouts.guard_of.return_value = GUARD
    coordinator.layouts.status = PlannerStatus()
    monkeypatch.setattr(metrics_tracker, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(metrics_tracker.dist, "all_reduce", lambda *_, **__: None)
    _, per_layer = metrics_tracker.collect(coordinator, 3, 2)
    logged = [name for name in per_layer if name.startswith("fsep_load_imbalance_layer_")]
    assert logged == [f"fsep_load_imbalance_layer_{row}" for row in rows]


def mean(values: Iterable[float]) -> Any:
    return pytest.approx(statistics.fmean(values))


def test_every_metric_that_is_named_in_the_code_is_described() -> None:
    tracker = (ROOT / "megatron_laer" / "plugin" / "metrics_tracker.py").read_text("utf-8")
    recorder = (ROOT / "megatron_laer" / "runtime" / "metrics_recorder.py").read_text("utf-8")
    source = inspect.getsource(telemetry.statistics) + tracker + recorder
    named = set(re.findall(r'"(fsep_\w+)"', source))
    assert named == {metric.name for metric in LOGGED if not metric.of}


def test_the_page_has_a_row_with_its_unit_for_each_metric() -> None:
    row = re.compile(r"^\| `(\w+)`([^|]*)\| *(\w*) *\| \S.* \|$", re.MULTILINE)
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8").partition("\n## The report\n")[0]
    tables = page.split("|---|---|---|")[1:]
    logged, of_steps, of_layers = map(row.findall, tables)
    assert [(name, unit) for name, _, unit in logged] == [(m.name, m.unit) for m in LOGGED]
    over_layers = [name for name, others, _ in logged if "_layer_{i}" in others]
    assert over_layers == [metric.name for metric in LOGGED if metric.over_layers]
    for rows, names in ((of_steps, RECORDED_OF_STEPS), (of_layers, RECORDED_OF_LAYERS)):
        assert tuple(name for name, _, _ in rows) == names


def test_the_log_line_leaves_megatrons_values_room_within_what_slurm_passes_on_at_once() -> None:
    names = [
        name
        for metric in LOGGED
        for part in ("", *(f"_p{p}" for p in PERCENTILES if metric.over_layers))
        if is_in_line(name := metric.name + part)
    ]
    assert {"fsep_load_imbalance", "fsep_load_imbalance_p95"} <= set(names)
    assert "fsep_load_imbalance_p99" not in names
    # Megatron's own part, with throughput, router and multi-token prediction losses: some 400.
    assert len("".join(f" {name}: 1234.567 |" for name in names)) < 1024 - 400
