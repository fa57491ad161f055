"""docs/metrics.md is what the code's descriptions of metrics make of it."""

from __future__ import annotations

import inspect
import re

from megatron_laer.runtime import metrics as worked_out
from megatron_laer.telemetry.metrics import LOGGED, RECORDED_OF_LAYERS, RECORDED_OF_STEPS
from tests.documents import ROOT
from tests.metrics_page import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.metrics_page"


def test_every_metric_that_is_named_in_the_code_is_described() -> None:
    tracker = (ROOT / "megatron_laer" / "plugin" / "metrics_tracker.py").read_text("utf-8")
    recorder = (ROOT / "megatron_laer" / "runtime" / "metrics_recorder.py").read_text("utf-8")
    source = inspect.getsource(worked_out) + tracker + recorder
    named = set(re.findall(r'"(fsep_\w+)"', source))
    assert named == {metric.name for metric in LOGGED}


def test_no_name_is_there_twice() -> None:
    for metrics in (LOGGED, RECORDED_OF_STEPS, RECORDED_OF_LAYERS):
        names = [metric.name for metric in metrics]
        assert len(set(names)) == len(names)
        assert all(metric.meaning and metric.unit for metric in metrics)
