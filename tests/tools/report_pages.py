"""Helpers that write report pages and read their data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatron_laer.choices import Sharding
from megatron_laer.tools import cli
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.recorded import RunData, recorded_run
from megatron_laer.tools.report.run_files import find_run
from megatron_laer.tools.traces import read_trace


def report(*words: object) -> int:
    return cli.main(["report", *map(str, words)])


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def written(tmp_path: Path, *words: object) -> str:
    assert report(*words, "--out", tmp_path / "page.html") == 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def run_of(folder: Path) -> RunData:
    files = find_run(folder, None)
    assert files.trace is not None
    return recorded_run(files, read_metrics(files.metrics), read_trace(files.trace), Sharding.ROWS)


def figure_of(data: dict[str, Any], title: str) -> dict[str, Any]:
    (found,) = [figure for figure in data["figures"] if figure["title"].startswith(title)]
    return found


def values_of(data: dict[str, Any], title: str) -> Any:
    return figure_of(data, title)["data"][0]["z"]


def without_plotly(page: str) -> str:
    return re.sub(r'(<script type="application/gzip" id="plotly">)[^<]*', r"\1", page)
