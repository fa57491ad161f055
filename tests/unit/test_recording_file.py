"""Recordings of routing, layouts and metrics never lose recorded steps.

Over 400 lines: one suite for every format.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from megatron_laer.files import writing
from megatron_laer.files.checks import MAX_LINE
from megatron_laer.files.json_lines import sealed
from megatron_laer.files.recording import RecordingFile, is_cut_off, run_of
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.runtime.planning.layout_recording import LayoutRecorder, read_layouts
from megatron_laer.telemetry.metrics import RECORDED_OF_LAYERS, RECORDED_OF_STEPS
from megatron_laer.telemetry.metrics_file import MetricsWriter, Shape
from megatron_laer.telemetry.trace_file import TraceWriter
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.traces.fsep import read_recording
from tests import fuzz
from tests.costs import COSTS

NUM_RANKS, NUM_EXPERTS, CAPACITY = 2, 4, 3
LAYERS = ["layer 1", "layer 2"]


class Traces:
    name = "group-0.trace"

    def __init__(self, path: Path, first_step: int, run: str | None = None) -> None:
        self._writer = TraceWriter(path, NUM_RANKS, NUM_EXPERTS, LAYERS, first_step, run)
        self.close = self._writer.close

    def step(self, step: int, seed: int) -> None:
        for layer in range(len(LAYERS)):
            self._writer.append(step, layer, 0, self._counts(step, seed + layer))

    @staticmethod
    def _counts(step: int, seed: int) -> np.ndarray:
        return np.full((NUM_RANKS, NUM_EXPERTS), 1000 * step + seed)

    @staticmethod
    def read(path: Path) -> dict[int, int]:
        trace = read_recording(path)
        firsts = np.flatnonzero(trace.layer_R == 0)
        return {
            int(trace.step_R[at]): int(trace.counts_RNE[at, 0, 0] - 1000 * trace.step_R[at])
            for at in firsts
        }


class Layouts:
    name = "group-0.jsonl"
    geometry = Geometry(NUM_RANKS, NUM_EXPERTS, CAPACITY, NUM_RANKS)
    signature: ClassVar = {"split": "exact"}

    def __init__(self, path: Path, first_step: int, run: str | None = None) -> None:
        of_run = LAYERS, first_step, run
        self._writer = LayoutRecorder(path, self.geometry, self.signature, *of_run)
        self.close = self._writer.close

    def step(self, step: int, seed: int) -> None:
        self._writer.begin_step(step)
        self._writer.record(step, [self._layout(step, seed)] * len(LAYERS))

    @staticmethod
    def _layout(step: int, seed: int) -> ExpertLayout:
        return ExpertLayout.random(NUM_RANKS, CAPACITY, NUM_EXPERTS, (step, seed))

    @classmethod
    def read(cls, path: Path) -> dict[int, int]:
        found = {}
        for step, layouts in read_layouts(path):
            (found[step],) = (s for s in (1, 2, 3) if layouts[0] == cls._layout(step, s))
        return found


class Metrics:
    name = "group-0.metrics"
    shape = Shape(NUM_RANKS, NUM_EXPERTS, CAPACITY, NUM_RANKS, tuple(LAYERS))

    def __init__(self, path: Path, first_step: int, run: str | None = None) -> None:
        of_run = {"torch": "9"}, first_step, COSTS.cluster, run
        self._writer = MetricsWriter(path, self.shape, *of_run)
        self.close = self._writer.close

    def step(self, step: int, seed: int) -> None:
        of_step = dict.fromkeys([*RECORDED_OF_STEPS], 0.0)
        of_layers = {name: [0.0] * len(LAYERS) for name in RECORDED_OF_LAYERS}
        tokens_LN = np.full((len(LAYERS), NUM_RANKS), 1000 * step + seed)
        self._writer.append(of_step | {"step": step}, {}, of_layers, tokens_LN)

    @staticmethod
    def read(path: Path) -> dict[int, int]:
        found = read_metrics(path)
        return {
            int(step): int(tokens_LN[0, 0] - 1000 * step)
            for step, tokens_LN in zip(found.steps_T, found.rank_tokens_TLN, strict=True)
        }


Kind = type[Traces] | type[Layouts] | type[Metrics]


@pytest.fixture(params=[Traces, Layouts, Metrics], ids=["traces", "layouts", "metrics"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


def record(kind: Kind, path: Path, steps: range, seed: int) -> None:
    writer = kind(path, steps[0])
    for step in steps:
        writer.step(step, seed)
    writer.close()


def test_a_new_run_in_a_used_folder_is_refused_and_told_the_way_out(
    kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(5), seed=1)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"holds the steps of an earlier run.*an empty folder, or"):
        kind(path, 0)
    assert path.read_bytes() == content and os.listdir(tmp_path) == [kind.name]


def test_a_second_writer_is_refused_until_the_first_has_ended(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / kind.name
    first = kind(path, 0)
    first.step(0, 1)
    for first_step in (0, 1):
        with pytest.raises(writing.InUseError, match="is being written by another run"):
            kind(path, first_step)
    first.step(1, 1)
    first.close()
    resumed = kind(path, 1)  # steps are moved aside
    with pytest.raises(writing.InUseError):
        kind(path, 1)
    resumed.close()


def test_steps_that_a_resumed_run_makes_again_are_moved_beside(
    kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(5), seed=1)
    record(kind, path, range(3, 6), seed=2)
    assert kind.read(path) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2}
    expected = {"group-0.cut-from-3": {3: 1, 4: 1}}
    asides = {name: path.with_stem(name) for name in expected}
    assert sorted(tmp_path.iterdir()) == sorted([path, *asides.values()])
    assert is_cut_off(asides["group-0.cut-from-3"]) and not is_cut_off(path)
    (message,) = caplog.messages
    assert f"recorded from step 3 on has been moved to group-0.cut-from-3{path.suffix}" in message
    record(kind, path, range(3, 5), seed=3)
    record(kind, path, range(1, 2), seed=2)
    assert kind.read(path) == {0: 1, 1: 2}
    expected |= {"group-0.cut-from-3.2": {3: 2, 4: 2, 5: 2}}
    expected |= {"group-0.cut-from-1": {1: 1, 2: 1, 3: 3, 4: 3}}
    assert {name: kind.read(path.with_stem(name)) for name in expected} == expected


def test_a_run_that_goes_on_where_the_recording_ends_changes_nothing_in_it(
    kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(3), seed=1)
    content, inode = path.read_bytes(), path.stat().st_ino
    record(kind, path, range(3, 5), seed=2)
    assert path.read_bytes().startswith(content) and path.stat().st_ino == inode
    assert kind.read(path) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}
    assert os.listdir(tmp_path) == [kind.name]


@pytest.mark.parametrize("back_to", [0, 2])
def test_steps_are_moved_beside_when_the_step_goes_back_within_a_run(
    kind: Kind, tmp_path: Path, back_to: int
) -> None:
    path = tmp_path / kind.name
    writer = kind(path, 0)
    for step in range(4):
        writer.step(step, 1)
    for step in range(back_to, 3):
        writer.step(step, 2)
    writer.close()
    assert kind.read(path) == {step: 1 if step < back_to else 2 for step in range(3)}
    aside = path.with_stem(f"group-0.cut-from-{back_to}")
    assert kind.read(aside) == dict.fromkeys(range(back_to, 4), 1)


def test_a_resumed_run_keeps_its_number(kind: Kind, tmp_path: Path) -> None:
    paths = [tmp_path / name / kind.name for name in ("one", "other")]
    for path in paths:
        record(kind, path, range(3), seed=1)
    first, other = map(run_of, paths)
    assert first is not None and other is not None and first != other
    record(kind, paths[0], range(2, 5), seed=2)
    assert run_of(paths[0]) == run_of(paths[0].with_stem("group-0.cut-from-2")) == first
    kind(tmp_path / kind.name, 0, first).close()
    kind(tmp_path / kind.name, 0, other).close()
    assert run_of(tmp_path / kind.name) == first


def test_layouts_that_did_not_change_again_are_moved_beside_as_well(tmp_path: Path) -> None:
    path = tmp_path / Layouts.name
    record(Layouts, path, range(5), seed=1)
    writer = LayoutRecorder(path, Layouts.geometry, Layouts.signature, LAYERS, 4)
    writer.begin_step(4)
    writer.begin_step(2)
    writer.close()
    assert Layouts.read(path) == {0: 1, 1: 1}


def test_links_to_a_recording_stay_and_a_hard_one_keeps_all(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path, link, hard = tmp_path / "disk" / kind.name, tmp_path / "link", tmp_path / "hard"
    link.symlink_to(path)
    record(kind, link, range(5), seed=1)
    hard.hardlink_to(path)
    record(kind, link, range(3, 5), seed=2)
    assert link.is_symlink() and kind.read(path)[3] == 2
    assert kind.read(path.with_stem("group-0.cut-from-3")) == {3: 1, 4: 1}
    assert kind.read(hard) == dict.fromkeys(range(5), 1)


def test_a_run_that_ended_before_its_first_step_leaves_the_folder_to_the_next(
    kind: Kind, tmp_path: Path
) -> None:
    others = {f".{kind.name}.tmp", ".other.0123456789abcdef.tmp"}
    # The last one was left by a killed run.
    for name in (*others, f".{kind.name}.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    kind(tmp_path / kind.name, 0).close()
    assert set(os.listdir(tmp_path)) == {kind.name, *others}
    record(kind, tmp_path / kind.name, range(2), seed=1)
    assert kind.read(tmp_path / kind.name) == {0: 1, 1: 1}


@pytest.mark.parametrize("first_step", [0, 2], ids=["header", "last record"])
def test_a_run_killed_within_a_record_is_resumed(
    kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture, first_step: int
) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(3), seed=1)
    size = path.stat().st_size
    os.truncate(path, size - 1 if first_step else 20)
    record(kind, path, range(first_step, 3), seed=2)
    assert kind.read(path) == {step: 1 if step < first_step else 2 for step in range(3)}
    assert not first_step or "bytes are no whole record and are left out" in caplog.text
    assert kind is Metrics or path.stat().st_size == size  # it names each run


def test_a_recording_of_another_shape_is_not_overwritten(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, notes = tmp_path / kind.name, tmp_path / "notes.txt"
    record(kind, path, range(2), seed=1)
    notes.write_text("dear diary")
    content = path.read_bytes()
    with pytest.raises(ValueError, match="dear diary"):
        kind(notes, 2)
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", ["layer 1"])
    monkeypatch.setattr(Metrics, "shape", replace(Metrics.shape, layers=("layer 1",)))
    with pytest.raises(ValueError, match=r"group-0.* begins with .*\"layers\".*another folder"):
        kind(path, 2)
    assert path.read_bytes() == content and notes.read_text() == "dear diary"


def test_a_huge_tail_is_refused_where_it_begins_and_is_not_read(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(3), seed=1)
    size = path.stat().st_size
    os.truncate(path, 50 * 10**9)  # takes no place on disk
    says = {
        Traces: rf"byte {size}: no record of its run begins there; .* a copy of {size} bytes",
        Layouts: r"line 5: has more than \d+ bytes",
        Metrics: r"(line 6: has more than [\d,]+ bytes|steps would take about .* GiB)",
    }[kind]
    before = fuzz.bytes_read()
    for opened in (kind.read, lambda path: kind(path, 3)):
        with pytest.raises(ValueError, match=rf"{kind.name}.*{says}"):
            opened(path)
    assert fuzz.bytes_read() - before < 3 * MAX_LINE
    os.truncate(path, size)
    assert kind.read(path) == dict.fromkeys(range(3), 1)


HEADERS = [
    ({"version": 1}, "version '1' of the format; .* reads version 2, so take the release that"),
    ({"version": 3}, "version '3' of the format; .* reads version 2, so take the release that"),
    ({"version": True}, "version 'True' of the format"),
    ({"num_ranks": 0}, "num_ranks must be an integer in 1"),
    ({"num_experts": 10**18}, r"num_experts must be an integer in 1..\d+, got '1000"),
    ({"layers": ["a", "a"]}, "layers must all be different"),
    ({"layers": "ab"}, "layers must be names"),
    ({"run": 7}, "run must be 16 hexadecimal digits, got '7'"),
]


@pytest.mark.parametrize(("changed", "problem"), HEADERS)
def test_a_header_that_does_not_fit_is_quoted(
    kind: Kind, tmp_path: Path, changed: dict[str, Any], problem: str
) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(2), seed=1)
    header, rest = path.read_bytes().split(b"\n", 1)
    fields = json.loads(header) | changed
    del fields["crc"]
    path.write_bytes(sealed(fields) + rest)
    with pytest.raises(ValueError, match=rf"{kind.name}, line 1: {problem}"):
        kind.read(path)


@contextlib.contextmanager
def full_disk(free: Path, more_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond a file's size and some bytes: a write is cut there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free.stat().st_size + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_a_recording_that_ends_with_a_whole_record(
    kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / kind.name
    writer = kind(path, 0)
    writer.step(0, 1)
    with full_disk(path, 10), pytest.raises(OSError, match=kind.name):
        writer.step(1, 1)
    assert kind.read(path) == {0: 1}
    writer.step(2, 1)
    writer.close()
    assert kind.read(path) == {0: 1, 2: 1}


@pytest.mark.parametrize("step", [1, 4])
def test_a_disk_that_is_too_full_to_move_steps_aside_leaves_all_where_it_is(
    kind: Kind, tmp_path: Path, step: int
) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(5), seed=1)
    content = path.read_bytes()
    # For step 1 the copy of the removed steps does not fit, for step 4 that of the kept steps.
    with full_disk(path, -len(content) // 2), pytest.raises(OSError, match=kind.name):
        kind(path, step)
    assert path.read_bytes() == content and os.listdir(tmp_path) == [kind.name]
    record(kind, path, range(step, step + 1), seed=2)
    assert kind.read(path) == {**dict.fromkeys(range(step), 1), step: 2}
    assert kind.read(path.with_stem(f"group-0.cut-from-{step}"))[4] == 1


CUT_AT = 3
# Operations on disk while steps are moved aside, in order. The run is killed before each of them:
# two copies, fsync and rename of the removed steps, fsync of the folder, then of the kept steps.
PHASES = range(9)
MOVED, REPLACED = 3, 6  # the two renames


def _killed_while_it_moves(kind: Kind, path: Path, left: int) -> None:
    def killing_before[**P, R](function: Callable[P, R]) -> Callable[P, R]:
        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return counted

    RecordingFile._copy = killing_before(RecordingFile._copy)  # type: ignore[method-assign]
    os.fsync, os.replace = killing_before(os.fsync), killing_before(os.replace)
    kind(path, CUT_AT)
    assert left == 0, left
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_while_it_moves_steps_aside_leaves_the_old_recording_or_the_new(
    kind: Kind, tmp_path: Path, phase: int
) -> None:
    path = tmp_path / kind.name
    record(kind, path, range(5), seed=1)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _killed_while_it_moves(kind, path, phase)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL

    assert kind.read(path) == dict.fromkeys(range(CUT_AT if phase > REPLACED else 5), 1)
    aside = path.with_stem(f"group-0.cut-from-{CUT_AT}")
    if phase > MOVED:
        assert kind.read(aside) == {3: 1, 4: 1}
    temporary = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(temporary) == 2 - (phase > REPLACED) - aside.exists()

    record(kind, path, range(CUT_AT, 6), seed=2)
    assert kind.read(path) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2}
    assert kind.read(aside) == {3: 1, 4: 1}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
