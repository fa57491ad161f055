"""Every metric is described once, and the log line stays within Slurm's limit."""

from __future__ import annotations

import inspect
import re

from megatron_laer.telemetry import statistics
from megatron_laer.telemetry.metrics import (
    LOGGED,
    PERCENTILES,
    RECORDED_OF_LAYERS,
    RECORDED_OF_STEPS,
    is_in_line,
)
from tests.documents import ROOT


def test_every_metric_that_is_named_in_the_code_is_described() -> None:
    tracker = (ROOT / "megatron_laer" / "plugin" / "metrics_tracker.py").read_text("utf-8")
    recorder = (ROOT / "megatron_laer" / "runtime" / "metrics_recorder.py").read_text("utf-8")
    source = inspect.getsource(statistics) + tracker + recorder
    named = set(re.findall(r'"(fsep_\w+)"', source))
    assert named == {metric.name for metric in LOGGED}


def test_no_name_is_there_twice() -> None:
    for metrics in (LOGGED, RECORDED_OF_STEPS, RECORDED_OF_LAYERS):
        names = [metric.name for metric in metrics]
        assert len(set(names)) == len(names)
        assert all(metric.meaning and metric.unit for metric in metrics)


def test_the_log_line_leaves_megatrons_values_room_within_what_slurm_passes_on_at_once() -> None:
    names = [
        name
        for metric in LOGGED
        for name in (
            metric.name,
            *(f"{metric.name}_p{p}" for p in PERCENTILES if metric.over_layers),
        )
        if is_in_line(name)
    ]
    assert {"fsep_load_imbalance", "fsep_load_imbalance_p95"} <= set(names)
    assert "fsep_load_imbalance_p99" not in names
    # Megatron's own part, with throughput, router and multi-token prediction losses: some 400.
    assert len("".join(f" {name}: 1234.567 |" for name in names)) < 1024 - 400
