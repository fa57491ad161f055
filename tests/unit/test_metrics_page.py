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

PAGE = ROOT / "docs" / "metrics.md"


def test_every_metric_that_is_named_in_the_code_is_described() -> None:
    tracker = (ROOT / "megatron_laer" / "plugin" / "metrics_tracker.py").read_text("utf-8")
    recorder = (ROOT / "megatron_laer" / "runtime" / "metrics_recorder.py").read_text("utf-8")
    source = inspect.getsource(statistics) + tracker + recorder
    named = set(re.findall(r'"(fsep_\w+)"', source))
    assert named == {metric.name for metric in LOGGED}


def test_the_page_has_a_row_with_its_unit_for_each_metric() -> None:
    row = re.compile(r"^\| `(\w+)`([^|]*)\| *(\w*) *\| \S.* \|$", re.MULTILINE)
    tables = PAGE.read_text("utf-8").split("|---|---|---|")[1:]
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
