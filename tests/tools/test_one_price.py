"""One decision has one price: in metrics, by `plan` on the trace and on the report's page."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_laer.choices import Auto, Dispatch, PlanMode, Sharding
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.forecast import SmoothedForecast
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.guard import Guard
from megatron_laer.planner.outcome import Outcome
from megatron_laer.planner.placed import Placed
from megatron_laer.planner.status import PlannerStatus
from megatron_laer.planner.strategies import make_strategy
from megatron_laer.planner.token_exchange import with_token_exchange
from megatron_laer.runtime.metrics_recorder import MetricsRecorder, run_settings
from megatron_laer.telemetry.metrics_file import METRICS, MetricsWriter, Shape
from megatron_laer.telemetry.trace_file import TraceWriter
from megatron_laer.tools import cli
from megatron_laer.tools.report.metrics_recording import read_metrics
from tests.costs import COSTS
from tests.recorded_runs import RUN_NUMBER, TickingClock
from tests.tools.report_pages import data_of, written

LAYERS, TOP_K, TOKENS = ("layer 1",), 2, 8192
SHARES_E = np.random.default_rng(4).dirichlet(np.full(16, 0.3))


def record(folder, sharding, dispatch):
    """Record two steps of one pass as training does, with prices of its own choice."""
    geometry = Geometry(4, 16, 6, 2, sharding)
    costs = replace(COSTS, cluster=load_cluster("h100-8"))
    costs = with_token_exchange(costs, dispatch, geometry, TOP_K, TOKENS)
    costs = costs.with_exchange(Auto.AUTO, geometry)
    guard = Guard(PlanMode.ADAPTIVE, costs, geometry)
    config = FSEPConfig(sharding=sharding, capacity=geometry.capacity)
    priced = {"top_k": TOP_K, "tokens_per_rank": TOKENS}
    run = run_settings(config, costs, priced, torch.device("cpu"))
    of = Shape(4, 16, 6, 2, LAYERS)
    writer = MetricsWriter(METRICS.path(folder, 0), of, run, 0, costs.cluster, RUN_NUMBER)
    recorder = MetricsRecorder(guard, torch.device("cpu"), TickingClock())
    recorder.open(writer, LAYERS)
    trace = TraceWriter(folder / "group-0.trace", 4, 16, LAYERS, 0, RUN_NUMBER)
    counts_TNE = np.random.default_rng(5).multinomial(TOP_K * TOKENS, SHARES_E, size=(2, 4))
    forecast_NE = SmoothedForecast().observe(counts_TNE[0]).counts_NE()
    static = geometry.static_layout
    planned = make_strategy("greedy", geometry=geometry, costs=costs).plan(forecast_NE, static)
    for step, layout in enumerate((static, planned)):
        recorder.begin_step(step)
        recorder.add(0, Outcome(guard.decide(counts_TNE[step], layout), 1e-3))
        recorder.end_step(PlannerStatus(), step, 0, 0)
        trace.append(step, 0, 0, counts_TNE[step])
    recorder.close()
    trace.close()
    return guard, Placed(planned, geometry), counts_TNE[1]


@pytest.mark.parametrize("dispatch", Dispatch)
@pytest.mark.parametrize("sharding", Sharding)
def test_metrics_plan_and_page_agree_on_a_decision(tmp_path, capsys, sharding, dispatch):
    run = tmp_path / "run"
    run.mkdir()
    guard, placed, counts_NE = record(run, sharding, dispatch)
    bound_s = guard.costs.least_layer_seconds(counts_NE, guard.geometry)
    assert guard.costs.exposed(placed, bound_s).exchanges_s > 0
    recorded = read_metrics(METRICS.path(run, 0))
    decided_ms = recorded.of_layers["predicted_ms"][1, 0]

    out = tmp_path / "plan.json"
    words = ["--strategy", "greedy", "--mode", "adaptive", "--json", str(out)]
    assert cli.main(["plan", str(run), *words]) == 0
    (planned,) = (row for row in json.loads(out.read_text())["rows"] if row["mode"] == "adaptive")
    assert planned["cases"] == 1
    assert planned["layer_ms"] == decided_ms

    page = written(tmp_path, run)
    rows = {(row["mode"], row["capacity"]): row for row in data_of(page)["what_if"]}
    row = rows["adaptive", 6]
    assert row["layer_ms"] == planned["layer_ms"]
    assert capsys.readouterr().err == ""
