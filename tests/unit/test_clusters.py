"""Shipped cluster files load; any other content of a file is a ValueError."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_laer.files.shipped import yaml_file
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
        ("237e12", "1_0", r"gemm\[1\] must be a number .*got '1_0'"),
        ("[4096, 237e12]", "[2, 237e12]", r"less time for more tokens; at 2 .* most 4\.000e\+12"),
        ("[4096, 237e12]", "[1, 237e12]", "increasing tokens, got 1 after 1"),
        ("[4096, 237e12]", "[4096]", r"must be a point \[tokens, FLOP/s\]"),
        ("2e-5", "1e308", r"inter\.latency_s must be at most 3600 s, got '1e308'"),
        ("3e11", "1e-300", r"bytes_per_s must be in 1\.\.1e\+24 per second, got '1e-300'"),
        ("nodes: 1", "nodes: ²", "nodes must be an integer in 1..1048576, got '²'"),
        ("nodes: 1", "speed: 3", r"lacks .*'nodes'\] and has the unknown keys \['speed'\]"),
        ("base_s: 1e-5", "base_s: -1", r"solve: base_s must be .* not negative, got -1"),
        ("factor: 1.5", "factor: 0", r"backward_gemm_factor must be positive and finite, got 0\.0"),
        ("{gemm: 1.1, ", "{gemm: fast, ", r"contention\.gemm must be a number .*got 'fast'"),
        ("weight_grad: ", "weights: ", r"back_ends\.loop lacks the keys \['weight_grad'\]"),
        ("low: 3e10", "low: 4e11", r"intra\.bytes_per_s: low 4e\+11 and high 3e\+11 are no range"),
        ("high: 3e11", "high: 2e11", r"is 3e\+11, outside of its spread 3e\+10\.\.2e\+11"),
        ("high: 3e11", "high: 1e300", r"spreads\.intra\.bytes_per_s\.high must be at most 1e\+24"),
        ("low: 3e10", "low: 0", r"intra\.bytes_per_s has a spread from 0, but must be positive"),
        ("gemm: {low", "gemms: {low", r"'gemms' is no constant with a spread; known are \['gemm'"),
        ("[2, 1, 3]", "[2, 1]", r"must be a figure \[median, low, high\], got \['2', '1'\]"),
        ("torch: 2.15.0", "torch: []", r"measured\.torch must be a text that is not empty, got"),
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nodes": True}, r"cluster\.nodes must be an integer in 1..1048576, got True"),
        ({"nodes": 1.5}, r"cluster\.nodes must be an integer in 1..1048576, got '1\.5'"),
        ({"backward_gemm_factor": math.nan}, "must be a number like 2.37e.14, got 'NaN'"),
        ({"backward_gemm_factor": -1}, "cluster: backward_gemm_factor must be positive"),
        ({"gemm": 10**400}, r"cluster\.gemm must be a list of points"),
        ({"intra": None}, r"cluster\.intra holds None, expected a mapping"),
        ({"more": 1}, r"cluster .*has the unknown keys \['more'\]"),
    ],
)
def test_json_of_a_cluster_is_checked_as_its_file_is(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cluster_of(as_json(parse_cluster(GOOD)) | change, "cluster")


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


CASES = 300
VALUES = st.recursive(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["1", "-1", "1e999", "~", "yes", "2001-99-99", "!!int ''", "!!bool x"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        inner.map(lambda item: f"{{tokens: {item}}}"),
    ),
    max_leaves=6,
)


@settings(max_examples=CASES)
@given(st.sampled_from(GOOD.splitlines(keepends=True)), VALUES)
@example("nodes: 1\n", "&x [*x]")
def test_any_value_loads_or_is_a_value_error(line: str, value: str) -> None:
    key = line.split(":")[0]
    try:
        cluster = parse_cluster(GOOD.replace(line, f"{key}: {value}\n"))
    except ValueError:
        return
    assert cluster.nodes >= 1
    assert cluster.gemm.unit_seconds(np.array([1]))[0] > 0


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
