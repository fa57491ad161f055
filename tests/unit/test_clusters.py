"""Shipped cluster files load; any other content of a file is a ValueError."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.yaml_text import parse_yaml
from megatron_laer.planner.cluster_files import (
    cluster_content,
    cluster_of,
    cluster_text,
    load_cluster,
    parse_cluster,
)
from megatron_laer.planner.clusters import (
    CONSTANTS,
    BackEnd,
    Cluster,
    Contention,
    Figure,
    HostTime,
    Link,
    SolveTime,
    Spread,
)
from megatron_laer.planner.gemm_curve import GemmCurve
from tests.oracles.costs import least_unit_seconds

SHIPPED = ["a100-4x8-ib800", "a100-8", "b200-8", "cpu-gloo", "h100-8", "h200-8"]

GOOD = """name: x
source: y
assumed: z
nodes: 1
ranks_per_node: 8
gemm:
  - [1, 2e12]
  - [4096, 237e12]
intra: {bytes_per_s: 3e11, latency_s: 0}
inter: {bytes_per_s: 1.25e+10, latency_s: 2e-5}
solve: {base_s: 1e-5, slot_s: 1e-7, count_s: 1e-9}
"""

# Optional constants of a file.
MEASURED = """backward_gemm_factor: 1.5
host: {launch_s: 5e-6, gate: {base_s: 1e-5, slot_s: 1e-7, count_s: 1e-9}}
contention: {gemm: 1.1, exchange: 1.2}
memory_bytes_per_s: 1e12
card: {memory_gib: 80, context_gib: 1, nccl_channels: 32, exchange_ctas: {intra: 16, inter: 8}}
back_ends:
  loop: {forward: [[1, 1e9]], input_grad: [[1, 1e9]], weight_grad: [[1, 5e8]]}
spreads:
  gemm: {low: 0.9, high: 1.1, source: s}
  intra.bytes_per_s: {low: 3e10, high: 3e11, source: s}
figures: {"one thing, s": [2, 1, 3]}
measured: {date: 2026-11-26, torch: 2.15.0}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("237e12", "-1.0", r"gemm: GEMM point \[4096, -1\.0\]: .* FLOP/s positive"),
        ("[4096, 237e12]", "[2, 237e12]", r"less time for more tokens; at 2 .* most 4\.000e\+12"),
        ("[4096, 237e12]", "[1, 237e12]", "increasing tokens, got 1 after 1"),
        ("[4096, 237e12]", "[4096]", r"must be a point \[tokens, FLOP/s\]"),
        ("2e-5", "1e308", r"inter\.latency_s must be at most 3600 s, got '1e308'"),
        ("3e11", "1e-300", r"bytes_per_s must be in 1\.\.1e\+24 per second, got '1e-300'"),
        ("nodes: 1", "speed: 3", r"lacks .*'nodes'\] and has the unknown keys \['speed'\]"),
        ("factor: 1.5", "factor: 0", r"backward_gemm_factor must be positive and finite, got 0\.0"),
        ("weight_grad: ", "weights: ", r"back_ends\.loop lacks the keys \['weight_grad'\]"),
        ("low: 3e10", "low: 4e11", r"intra\.bytes_per_s: low 4e\+11 and high 3e\+11 are no range"),
        ("high: 3e11", "high: 2e11", r"is 3e\+11, outside of its spread 3e\+10\.\.2e\+11"),
        ("high: 3e11", "high: 1e300", r"spreads\.intra\.bytes_per_s\.high must be at most 1e\+24"),
        ("low: 3e10", "low: 0", r"intra\.bytes_per_s has a spread from 0, but must be positive"),
        ("gemm: {low", "gemms: {low", r"'gemms' is no constant with a spread; known are \['gemm'"),
        ("[2, 1, 3]", "[2, 1]", r"must be a figure \[median, low, high\], got \['2', '1'\]"),
        ("  loop: {", "  foo: {", r"back_ends\.foo: 'foo' is no back end; known are loop, te"),
        ("context_gib: 1", "context_gib: 80", r"card: context_gib must be less than memory_gib 80"),
        ("channels: 32", "channels: 65", r"card: nccl_channels must be in 1\.\.64, NCCL's most"),
        ("intra: 16", "intra: 1000", r"card\.exchange_ctas: intra must be in 1\.\.64"),
        (GOOD, "- 1", r"the file holds \['1'\], expected a mapping"),
    ],
)
def test_cluster_files_are_checked(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    whole = GOOD if old in GOOD else GOOD + MEASURED
    assert old in whole
    path.write_text(whole.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"(?s)x\.yaml: .*{message}"):
        load_cluster(path)


# Keys of texts, and of figures, which may be negative.
NO_NUMBERS = {"name", "source", "assumed", "one thing, s", "date", "torch"}


def changed_in_place(content: Any, *keys: str) -> Iterator[tuple[str, ...]]:
    """Give each value of a file or of JSON another kind in turn, and yield the last keys to it."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        names = (*keys[-1:], key) if isinstance(key, str) else keys
        if isinstance(value, dict | list):
            yield from changed_in_place(value, *names)
            continue
        numbers = ("nan", "1_0", "-1", "1e400", "²", None, True, math.nan)
        for content[key] in ("", [], {}, *(() if names[-1] in NO_NUMBERS else numbers)):
            yield names
        content[key] = value


def test_a_value_of_another_kind_is_refused_wherever_it_is_and_its_key_is_named() -> None:
    content: Any = parse_yaml(GOOD + MEASURED)
    for keys in changed_in_place(content):
        with pytest.raises(ValueError, match="|".join(map(re.escape, keys))):
            cluster_of(content, "cluster")
    assert cluster_of(content, "cluster") == parse_cluster(GOOD + MEASURED)


def test_what_a_file_leaves_out_changes_nothing_and_what_calibrate_adds_is_read() -> None:
    cluster = parse_cluster(GOOD)
    # YAML 1.1 reads a number without a point or without the exponent's sign as text.
    assert cluster.gemm == GemmCurve(((1, 2e12), (4096, 2.37e14)))
    assert (cluster.intra, cluster.solve) == (Link(3e11, 0.0), SolveTime(1e-5, 1e-7, 1e-9))
    assert (cluster.backward_gemm_factor, cluster.contention) == (1.0, Contention())
    assert cluster.host is None
    assert not (cluster.back_ends or cluster.spreads or cluster.figures or cluster.measured)
    assert cluster.intra.peer_s == 0.0 and cluster.memory_bytes_per_s is None
    cluster = parse_cluster(GOOD + MEASURED)
    curve = GemmCurve(((1, 1e9),))
    assert cluster.back_ends == (BackEnd("loop", curve, curve, GemmCurve(((1, 5e8),))),)
    assert cluster.back_ends[0].backward_gemm_factor == cluster.backward_gemm_factor == 1.5
    assert cluster.host == HostTime(5e-6, SolveTime(1e-5, 1e-7, 1e-9))
    assert cluster.contention == Contention(1.1, 1.2)
    assert dict(cluster.spreads)["gemm"] == Spread(0.9, 1.1, "s")
    assert cluster.figures == (("one thing, s", Figure(2.0, 1.0, 3.0)),)
    assert dict(cluster.measured) == {"date": "2026-11-26", "torch": "2.15.0"}
    assert parse_cluster(cluster_text(cluster)) == cluster


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_clusters_load_and_are_written_and_read_again(name: str) -> None:
    cluster, file = load_cluster(name), yaml_file("cluster", name)
    assert cluster.name == name
    assert load_cluster(file) == load_cluster(str(file)) == cluster
    assert parse_cluster(cluster_text(cluster)) == cluster
    assert cluster_of(as_json(cluster), "cluster") == cluster
    assert max(map(len, cluster_text(cluster).splitlines())) < 200
    # Contention has a range, and its basis is named.
    spreads = dict(cluster.spreads)
    for constant in ("contention.gemm", "contention.exchange"):
        value, spread = cluster.constant(constant), spreads[constant]
        assert value is not None and 1.0 <= spread.low < value < spread.high
        assert "measured" in spread.source or "Contention of GEMMs" in cluster.assumed


@settings(max_examples=100)
@given(st.text(min_size=1).filter(str.strip), st.floats(1e-12, 1e3), st.floats(1.0, 1e20))
def test_any_text_and_number_is_written_and_read_again(
    text: str, seconds: float, rate: float
) -> None:
    cluster = replace(
        parse_cluster(GOOD),
        source=text,
        intra=Link(rate, seconds, seconds),
        figures=((text, Figure(seconds, seconds, rate)),),
    )
    assert parse_cluster(cluster_text(cluster)) == cluster
    assert cluster_of(as_json(cluster), "cluster") == cluster


def as_json(cluster: Cluster) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(cluster_content(cluster)))
    return content


def test_a_constant_is_replaced_by_name_and_others_stay() -> None:
    cluster = parse_cluster(GOOD + MEASURED)
    for name in CONSTANTS:
        value = cluster.constant(name)
        assert value is not None
        changed = cluster.with_constants({name: value * 2})
        again = changed.with_constants({name: 0.5 if value == 1.0 else value})
        assert replace(again, spreads=cluster.spreads) == cluster or value == 0.0, name
        if name not in ("gemm", "solve", "host.gate"):
            assert changed.constant(name) == value * 2
    twice = cluster.with_constants({"gemm": 2.0, "solve": 2.0})
    assert twice.gemm.points[0] == (1, 4e12) and twice.solve.base_s == 2e-5
    with pytest.raises(ValueError, match="'speed' is no constant with a spread"):
        cluster.with_constants({"speed": 1.0})
    with pytest.raises(ValueError, match="memory_bytes_per_s is not given for x"):
        parse_cluster(GOOD).with_constants({"memory_bytes_per_s": 1.0})
    with pytest.raises(ValueError, match="spreads has memory_bytes_per_s, which is not given"):
        spreads = (("memory_bytes_per_s", Spread(1, 2, "s")),)
        replace(cluster, memory_bytes_per_s=None, spreads=spreads)


def test_a_back_end_that_was_measured_brings_its_gemms() -> None:
    cluster = parse_cluster(GOOD + MEASURED)
    chosen = cluster.for_back_end("loop")
    assert chosen.gemm == GemmCurve(((1, 1e9),)) and chosen.backward_gemm_factor == 1.5
    assert [name for name, _ in chosen.spreads] == ["intra.bytes_per_s"]
    assert cluster.for_back_end("te") is cluster


@st.composite
def curves(draw: st.DrawFn) -> GemmCurve:
    tokens = sorted(draw(st.sets(st.integers(1, 5000), min_size=1, max_size=6)))
    seconds = sorted(draw(st.floats(1e-6, 1.0)) for _ in tokens)
    return GemmCurve(tuple((m, m / s) for m, s in zip(tokens, seconds, strict=True)))


@settings(max_examples=100)
@given(st.data())
def test_time_grows_with_tokens_and_meets_the_points(data: st.DataObject) -> None:
    try:
        curve = data.draw(curves())
    except ValueError:  # rounding put two equal times in the wrong order
        return
    tokens = np.unique(data.draw(st.lists(st.integers(0, 6000), min_size=1, max_size=40)))
    seconds = curve.unit_seconds(tokens)
    assert (np.diff(seconds) >= 0).all()
    assert (seconds[tokens == 0] == 0).all()
    for point, flops_per_s in curve.points:
        assert curve.unit_seconds(np.array([point]))[0] == pytest.approx(point / flops_per_s)
    assert (least_unit_seconds(curve, tokens) <= seconds).all()
    # No division into GEMMs is faster than the bound.
    least = least_unit_seconds(curve, np.array([tokens.sum()]))[0]
    assert least <= seconds.sum() * (1 + 1e-12)


def test_time_is_linear_between_points_and_constant_below_the_first() -> None:
    curve = GemmCurve(((10, 1e3), (30, 1.5e3)))
    tokens = np.array([0, 1, 10, 20, 30, 60])
    np.testing.assert_allclose(curve.unit_seconds(tokens), [0, 0.01, 0.01, 0.015, 0.02, 0.04])
    with pytest.raises(ValueError, match="at least one point"):
        GemmCurve(())


def test_a_name_that_exists_is_read_or_refused_by_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("of-ours").write_text(yaml_file("cluster", "h100-8").read_text())
    assert load_cluster("of-ours") == load_cluster("h100-8")
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    for name, said in (
        ("pipe", "'pipe' is a pipe; give a regular file"),
        ("folder", "'folder' is a folder; give a regular file"),
        ("dangling", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            load_cluster(name)
    with pytest.raises(ValueError, match="unknown cluster 'absent'"):
        load_cluster("absent")
