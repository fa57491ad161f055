"""A run is predicted with its recorded settings, or the page names the replacements."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_laer.planner.clusters import Cluster
from megatron_laer.tools import cli
from tests.recorded_runs import COSTS, OWN, RUN, record_run
from tests.tools.report_pages import data_of, report, written

OTHER = {
    "cluster": OWN.name,
    "token_exchange": "node",
    "top_k": "3",
    "gated": "False",
    "bytes_per_element": "4",
}


@pytest.mark.parametrize("run", [RUN, RUN | OTHER], ids=["as by default", "of its own"])
@pytest.mark.parametrize("cluster", [OWN, None], ids=["constants", "no constants"])
def test_commands_of_the_what_if_print_their_rows_again(
    tmp_path: Path, run: dict[str, str], cluster: Cluster | None
) -> None:
    folder = tmp_path / "run"
    record_run(folder, run=run, cluster=cluster)
    rows = data_of(written(tmp_path, folder))["what_if"]
    assert {row["capacity"] for row in rows} == {2, 3, 4}
    assert {row["mode"] for row in rows} == {"-", "forecast", "exact", "adaptive"}
    for number, row in enumerate(rows):
        words = shlex.split(row["command"])
        assert words[:4] == ["python", "-m", "megatron_laer", "plan"]
        out = tmp_path / f"{number}.json"
        assert cli.main([*words[3:], "--json", str(out)]) == 0
        found = [
            one
            for one in json.loads(out.read_text())["rows"]
            if (one["strategy"], one["mode"], one["capacity"])
            == (row["strategy"], row["mode"], row["capacity"])
        ]
        assert len(found) == 1
        for name in ("cases", "mean", "p95", "p99", "off_node_share", "replan_share", "layer_ms"):
            assert found[0][name] == row[name], (row["command"], name)


def test_a_run_is_predicted_with_the_constants_that_it_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use neither the default cluster's constants nor a file."""
    rows = {}
    for cluster in (OWN, COSTS.cluster):
        record_run(tmp_path / cluster.name, run=RUN | {"cluster": cluster.name}, cluster=cluster)
        page = written(tmp_path, tmp_path / cluster.name)
        assert f"2 bytes per number, on {cluster.name}." in page and "taken instead" not in page
        rows[cluster.name] = data_of(page)["what_if"]
        assert not any("--cluster" in row["command"] for row in rows[cluster.name])
    for own, other in zip(*rows.values(), strict=True):
        assert own["layer_ms"] > 1.5 * other["layer_ms"]
    page = written(tmp_path, tmp_path / OWN.name, "--cluster", COSTS.cluster.name)
    again, there = data_of(page)["what_if"], rows[COSTS.cluster.name]
    assert [row["layer_ms"] for row in again] == [row["layer_ms"] for row in there]
    assert all(f"--cluster {COSTS.cluster.name}" in row["command"] for row in again)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("noted", "says"),
    [
        ({"cluster": "my-machine"}, "a100-4x8-ib800 for cluster 'my-machine', whose constants it"),
        ({"cluster": "../x.yaml"}, "a100-4x8-ib800 for cluster '../x.yaml', whose constants it"),
        ({"hidden": "wide", "ffn": "0"}, "4096 for hidden 'wide'; 14336 for ffn '0'"),
        ({"gated": "maybe"}, "True for gated 'maybe'"),
        ({"bytes_per_element": "x"}, "2 for bytes_per_element 'x'"),
        ({"recompute": "True"}, "none for recompute 'True'"),
        ({"restore_algorithm": "pigeon"}, "flat for restore_algorithm 'pigeon'"),
        ({"token_exchange": "auto"}, "rank for token_exchange 'auto'"),
        ({"top_k": "\x1b[31m"}, "2 for top_k '\\x1b[31m'"),
    ],
)
def test_settings_that_cannot_be_used_are_named_with_what_is_taken_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], noted: dict[str, str], says: str
) -> None:
    folder = tmp_path / "run"
    record_run(folder, run=RUN | noted, cluster=None)
    page = written(tmp_path, folder)
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1 and err.strip().isprintable()
    assert f"taken instead: {says}" in html.unescape(page)
    assert "taken instead" not in written(tmp_path, folder, "--cases", 0)
    assert capsys.readouterr().err == ""


def test_what_a_recording_does_not_say_is_named_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    record_run(folder, run={"cluster": COSTS.cluster.name, "gated": "True", "ffn": "8"})
    written(tmp_path, folder)
    missing = "4096 for hidden, which is missing; 2 for bytes_per_element, which is missing"
    assert f"taken instead: {missing}; none for recompute" in capsys.readouterr().err


def test_a_trace_beside_its_metrics_is_predicted_as_the_run_was(tmp_path: Path) -> None:
    record_run(tmp_path / "run", run=RUN | OTHER, cluster=OWN)
    trace = tmp_path / "run" / "group-0.trace"
    page = written(tmp_path, trace)
    sent = "tokens sent by node, on my-machine"
    assert f"experts of 4096 x 14336, not gated, 4 bytes per number, {sent}" in page
    settings = dict(re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', page))
    assert settings["ranks per node G"] == "2" and settings["slots per rank C"] == "3"
    (trace.parent / "metrics-0.jsonl").rename(tmp_path / "moved")
    (trace.parent / "metrics-0.jsonl").symlink_to(tmp_path / "moved")
    assert report(trace, "--out", tmp_path / "moved") == 2
    page = written(tmp_path, trace, "--config", "mixtral-8x7b-e8k2")
    assert f"experts of 4096 x 14336, 2 bytes per number, {sent}" in page
