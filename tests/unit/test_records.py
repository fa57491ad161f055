"""Records of every declared format: written, resumed and cut without loss, and never misread.

Over 400 lines: one suite for all files of records.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_laer.files import writing
from megatron_laer.files.checks import open_input
from megatron_laer.files.recording import RecordingFile, run_of
from megatron_laer.files.records import (
    COUNT,
    MAX_STEP,
    Field,
    Format,
    Records,
    header_line,
    is_cut_off,
)
from tests import fuzz, records
from tests.records import FORMATS, records_of, taken_apart

RUN, OTHER_RUN = "0123456789abcdef", "fedcba9876543210"
# Sizes of all formats; each checks its own.
FIELDS: dict[str, Any] = {
    "num_ranks": 2,
    "num_experts": 4,
    "capacity": 3,
    "node_size": 2,
    "pairs": 10,
    "set_bytes": 1,
    "layers": ["layer 1", "layer 2"],
}


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


@pytest.fixture
def path(tmp_path: Path, format: Format) -> Path:
    return format.path(tmp_path, 0)


def values_of(format: Format, kind: str, seed: object) -> dict[str, Any]:
    """Draw values that a record of this kind can have; an open dimension is any length."""
    luck = np.random.default_rng(random.Random(str((format.name, kind, seed))).randrange(2**32))
    sizes = FIELDS | dict(format.columns)

    def size(name: Any) -> int:
        found = sizes.get(name, name) if isinstance(name, str) else name
        return len(found) if isinstance(found, list | tuple) else int(found)

    length = int(luck.integers(0, 9))
    values = {}
    for of in format.kinds[kind]:
        shape = tuple(length if name == "open" else size(name) for name in of.shape)
        if of.dtype == "<f8":
            drawn = luck.normal(size=shape)
        else:
            most = min(size(of.below or 2**7), 2 ** (8 * int(of.dtype[-1:].replace("t", "4"))))
            drawn = luck.integers(0, luck.integers(1, most + 1), size=shape)
        values[of.name] = drawn if shape else drawn.item()
    return values


def writer(path: Path, first_step: int, run: str | None = None, **fields: Any) -> RecordingFile:
    return RecordingFile(path, records.format_of(path), FIELDS | fields, first_step, run)


def write_step(file: RecordingFile, path: Path, step: int, seed: int) -> None:
    format = records.format_of(path)
    for kind in format.kinds:
        file.add(kind, step, **values_of(format, kind, (step, seed)))


def record(path: Path, steps: range, seed: int, run: str | None = RUN) -> None:
    file = writer(path, steps[0], run)
    for step in steps:
        write_step(file, path, step, seed)
    file.close()


def read(path: Path) -> list[tuple[str, int, str]]:
    """Return each record's kind, step and values, as text."""
    return [(kind, step, text_of(values)) for kind, step, values in taken_apart(path)[1]]


def text_of(values: dict[str, Any]) -> str:
    return repr({name: np.asarray(of).tolist() for name, of in values.items()})


def steps_in(path: Path) -> dict[int, int]:
    """Return the seed of each recorded step."""
    format = records.format_of(path)
    first = next(iter(format.kinds))
    seeds = {
        (step, text_of(values_of(format, first, (step, seed)))): seed
        for step in range(9)
        for seed in (1, 2, 3)
    }
    return {step: seeds[step, text] for kind, step, text in read(path) if kind == first}


def test_values_come_back_as_they_were(format: Format, path: Path) -> None:
    file, expected = writer(path, 0), []
    for step in (0, 7, 7, MAX_STEP):
        for kind in format.kinds:
            values = values_of(format, kind, len(expected))
            file.add(kind, step, **values)
            expected.append((kind, step, text_of(values)))
        file.step = step - 1 if step == 7 else step  # the step is not begun again
    file.close()
    assert [of for of in read(path) if of[1] != 7] == [of for of in expected if of[1] != 7]


@pytest.mark.parametrize(("most", "width"), [(255, 1), (256, 2), (65_535, 2), (65_536, 4)])
def test_a_count_takes_as_many_bytes_as_its_record_needs(most: int, width: int) -> None:
    counting = Format("counting", "x", "x", {}, {"x": (Field("c", COUNT, (5,), 2**31),)})
    codec = Records(counting, {"layers": ["a"]})
    few, many = (codec.encode("x", 1, 0, {"c": [value] * 5}) for value in (0, most))
    assert len(many) - len(few) == 5 * (width - 1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"counts_NE": np.zeros((4, 2))}, r"counts_NE has shape \(4, 2\), expected \(2, 4\)"),
        ({"counts_NE": np.full((2, 4), -1)}, "counts_NE must be in 0..2147483647, got -1"),
        ({"counts_NE": np.full((2, 4), 2**31)}, "got 2147483648"),
        ({"layer": 2}, "layer must be in 0..1, got 2"),
        ({"microbatch": 2**32}, "microbatch must be in 0..4294967295"),
        ({"step": MAX_STEP + 1}, "step must be in"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_leaves_no_byte(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    path = FORMATS["trace"].path(tmp_path, 0)
    file = writer(path, 0)
    size = path.stat().st_size
    values = {"step": 0, "layer": 0, "microbatch": 0, "counts_NE": np.ones((2, 4), int)}
    with pytest.raises(ValueError, match=problem):
        file.add("counts", **values | changes)
    assert path.stat().st_size == size
    file.close()


def test_a_run_that_begins_at_step_0_moves_what_is_there_to_another_file(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(path, range(5), seed=1)
    contents = [path.read_bytes()]
    for content in (contents[0][:-1], contents[0].replace(b"layer 2", b"layer 3", 1)):
        path.write_bytes(content)  # cut off, or of another model
        contents.append(content)
    writer(path, 0, OTHER_RUN).close()
    assert path.read_bytes() == records_of(path)[0] and run_of(path) == OTHER_RUN
    record(path, range(2), seed=2, run=RUN)
    assert steps_in(path) == {0: 2, 1: 2} and run_of(path) == RUN
    aside = path.with_stem("group-0.cut-from-0")
    assert is_cut_off(aside) and aside.read_bytes() == contents[-1]
    record(path, range(1), seed=3, run=OTHER_RUN)
    assert steps_in(path) == {0: 3} and run_of(path) == OTHER_RUN
    assert steps_in(path.with_stem("group-0.cut-from-0.2")) == {0: 2, 1: 2}
    assert len(caplog.messages) == 2 and "recorded from step 0 on has been mo" in caplog.text


def test_a_second_writer_is_refused_until_the_first_has_ended(path: Path) -> None:
    first = writer(path, 0)
    write_step(first, path, 0, 1)
    for first_step in (0, 1):
        with pytest.raises(writing.InUseError, match="is being written by another run"):
            writer(path, first_step)
    write_step(first, path, 1, 1)
    first.close()
    resumed = writer(path, 1)  # steps are moved aside
    with pytest.raises(writing.InUseError):
        writer(path, 1)
    resumed.close()


def test_steps_that_a_resumed_run_makes_again_are_moved_beside(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(path, range(5), seed=1)
    inode = path.stat().st_ino
    record(path, range(5, 6), seed=1, run=OTHER_RUN)  # continues, with the run's number
    assert path.stat().st_ino == inode and not caplog.messages
    record(path, range(3, 6), seed=2)
    assert steps_in(path) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2}
    (message,) = caplog.messages
    assert f"recorded from step 3 on has been moved to group-0.cut-from-3{path.suffix}" in message
    record(path, range(3, 5), seed=3)
    record(path, range(1, 2), seed=2)
    assert steps_in(path) == {0: 1, 1: 2}
    asides = {
        "group-0.cut-from-3": {3: 1, 4: 1, 5: 1},
        "group-0.cut-from-3.2": {3: 2, 4: 2, 5: 2},
        "group-0.cut-from-1": {1: 1, 2: 1, 3: 3, 4: 3},
    }
    for name, expected in asides.items():
        aside = path.with_stem(name)
        assert is_cut_off(aside) and steps_in(aside) == expected and run_of(aside) == RUN
    assert not is_cut_off(path) and len(os.listdir(path.parent)) == 4


@pytest.mark.parametrize("back_to", [0, 2])
def test_steps_are_moved_beside_when_the_step_goes_back_within_a_run(
    path: Path, back_to: int
) -> None:
    file = writer(path, 0)
    for step in range(4):
        write_step(file, path, step, 1)
    for step in range(back_to, 3):
        write_step(file, path, step, 2)
    file.begin_step(2)  # nothing of it is recorded again
    file.close()
    assert steps_in(path) == {step: 1 if step < back_to else 2 for step in range(2)}
    aside = path.with_stem(f"group-0.cut-from-{back_to}")
    assert steps_in(aside) == dict.fromkeys(range(back_to, 4), 1)


def test_missing_steps_before_those_of_a_resumed_run_are_said(
    format: Format, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(path, range(3), seed=1)
    record(path, range(5, 7), seed=1)
    said = "nothing is recorded of steps 3 to 4, which an earlier run made" in caplog.text
    assert said == format.has_every_step


def test_a_run_that_ended_before_its_first_step_leaves_the_folder_to_the_next(path: Path) -> None:
    for content in (b"", records.Records(records.format_of(path), FIELDS).line[:-9]):
        path.write_bytes(content)  # killed while it wrote its header
        writer(path, 0).close()
        assert os.listdir(path.parent) == [path.name]
    record(path, range(2), seed=1)
    assert steps_in(path) == {0: 1, 1: 1}


def test_a_file_that_ends_anywhere_is_read_to_its_last_whole_record_and_resumed(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(path, range(3), seed=1)
    content, expected = path.read_bytes(), read(path)
    pieces = records_of(path)
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    for length in [*range(ends[0], len(content), 7), *ends[:-1], 20, 0]:
        path.write_bytes(content[:length])
        caplog.clear()
        whole = sum(end <= length for end in ends) - 1
        if whole >= 0:
            assert read(path) == expected[:whole]
            assert ("are left out" in caplog.text) == (length not in ends)
        writer(path, 3, RUN).close()
        assert path.read_bytes() == content[: ends[max(whole, 0)]]


def test_a_header_that_ends_within_its_runs_number_is_written_anew(path: Path) -> None:
    record(path, range(1), seed=1)
    content = path.read_bytes()
    number = content.index(RUN.encode())
    for length in (number, number + 3, number + 15):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="no header"):
            read(path)
        record(path, range(4, 5), seed=2, run=OTHER_RUN)
        assert steps_in(path) == {4: 2} and run_of(path) == OTHER_RUN


def test_a_file_set_aside_from_step_0_has_all_its_records(path: Path) -> None:
    record(path, range(3), seed=1)
    header, first, *rest = records_of(path)
    aside = path.with_stem("group-0.cut-from-0.2")
    aside.write_bytes(header + first + b"".join(rest))
    assert read(aside) == read(path)
    aside.write_bytes(header + b"".join(rest))
    with pytest.raises(ValueError, match=rf"record 1 at byte {len(header)}: it is record 2; oth"):
        read(aside)


def test_a_recording_of_another_shape_is_not_overwritten(path: Path) -> None:
    notes = path.with_name(f"notes{path.suffix}")
    record(path, range(2), seed=1)
    notes.write_text("dear diary")
    content = path.read_bytes()
    with pytest.raises(ValueError, match="dear diary"):
        writer(notes, 2)
    with pytest.raises(ValueError, match=r"group-0.* begins with .*\"layers\".*another folder"):
        writer(path, 2, layers=["layer 1"])
    assert path.read_bytes() == content and notes.read_text() == "dear diary"


HEADERS = [
    ({"version": 2}, "version '2' of the format; .* reads version 3, so take the release that"),
    ({"version": 4}, "version '4' of the format; .* reads version 3, so take the release that"),
    ({"version": True}, "version 'True' of the format"),
    ({"format": "other"}, "it begins with .*; give a "),
    ({"num_ranks": 0}, "num_ranks must be an integer in 1"),
    ({"num_ranks": True}, "num_ranks must be an integer in 1..1048576, got 'True'"),
    ({"num_experts": "8"}, "num_experts must be an integer in 1..32767|1048576, got '8'"),
    ({"num_experts": 10**18}, r"num_experts must be an integer in 1..\d+, got '1000"),
    ({"layers": ["a", "a"]}, "layers must all be different"),
    *(({"layers": layers}, "layers must be names") for layers in ("ab", [], [1], None)),
    ({"of_layers": ["new"]}, "of_layers .*new.* are another release's"),
]


@pytest.mark.parametrize(("changed", "problem"), HEADERS)
def test_a_header_that_does_not_fit_is_quoted(
    format: Format, path: Path, changed: dict[str, Any], problem: str
) -> None:
    record(path, range(2), seed=1)
    header, rest = path.read_bytes().split(b"\n", 1)
    fields = json.loads(header) | changed
    del fields["crc"]
    path.write_bytes(header_line(format.name, fields) + rest)
    if {*changed} & {"num_ranks", "num_experts", "of_layers"} - {*format.sizes, *format.columns}:
        return
    with pytest.raises(ValueError, match=rf"{path.name}, line 1: {problem}"):
        read(path)


def test_a_huge_tail_is_refused_where_it_begins_and_is_not_read(path: Path) -> None:
    record(path, range(3), seed=1)
    size, expected = path.stat().st_size, read(path)
    os.truncate(path, 50 * 10**9)  # takes no place on disk
    before = fuzz.bytes_read()
    for opens in (read, lambda path: writer(path, 3)):
        says = rf"byte {size}: no record of its run begins there; .* a copy of {size} bytes"
        with pytest.raises(ValueError, match=rf"{path.name}.*{says}"):
            opens(path)
    assert fuzz.bytes_read() - before < 2**25
    os.truncate(path, size)
    assert read(path) == expected


def test_zeros_that_a_loss_of_power_left_are_the_end(path: Path) -> None:
    record(path, range(3), seed=1)
    content, expected = path.read_bytes(), read(path)
    for zeros in (1, 20, len(records_of(path)[-1])):
        path.write_bytes(content[:-zeros] + bytes(zeros))
        assert read(path) == expected[: -1 if path.read_bytes() != content else None]
    path.write_bytes(content + bytes(1000))
    assert read(path) == expected


@contextlib.contextmanager
def full_disk(free: Path, more_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond a file's size and some bytes: a write is cut there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free.stat().st_size + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_a_recording_that_ends_with_a_whole_record(path: Path) -> None:
    file = writer(path, 0)
    write_step(file, path, 0, 1)
    with full_disk(path, 10), pytest.raises(OSError, match=path.name):
        write_step(file, path, 1, 1)
    assert steps_in(path) == {0: 1}
    write_step(file, path, 2, 1)
    file.close()
    assert steps_in(path) == {0: 1, 2: 1}


@pytest.mark.parametrize("step", [1, 4])
def test_a_disk_that_is_too_full_to_move_steps_aside_leaves_all_where_it_is(
    path: Path, step: int
) -> None:
    record(path, range(5), seed=1)
    content = path.read_bytes()
    # For step 1 the copy of the removed steps does not fit, for step 4 that of the kept steps.
    with full_disk(path, -len(content) // 2), pytest.raises(OSError, match=path.name):
        writer(path, step)
    assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]
    record(path, range(step, step + 1), seed=2)
    assert steps_in(path) == {**dict.fromkeys(range(step), 1), step: 2}
    assert steps_in(path.with_stem(f"group-0.cut-from-{step}"))[4] == 1


CUT_AT = 3
# Operations on disk while steps are moved aside, in order. The run is killed before each of them:
# two copies, fsync and rename of the removed steps, fsync of the folder, then of the kept steps.
PHASES = range(9)
MOVED, REPLACED = 3, 6  # the two renames


def _killed_while_it_moves(path: Path, left: int) -> None:
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
    writer(path, CUT_AT)
    assert left == 0, left
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_while_it_moves_steps_aside_leaves_the_old_recording_or_the_new(
    tmp_path: Path, phase: int
) -> None:
    path = FORMATS["trace"].path(tmp_path, 0)
    record(path, range(5), seed=1)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _killed_while_it_moves(path, phase)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL

    assert steps_in(path) == dict.fromkeys(range(CUT_AT if phase > REPLACED else 5), 1)
    aside = path.with_stem(f"group-0.cut-from-{CUT_AT}")
    if phase > MOVED:
        assert steps_in(aside) == {3: 1, 4: 1}
    temporary = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(temporary) == 2 - (phase > REPLACED) - aside.exists()

    record(path, range(CUT_AT, 6), seed=2)
    assert steps_in(path) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2}
    assert steps_in(aside) == {3: 1, 4: 1}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


CHANGES = 240


def outcome(path: Path, expected: list[tuple[str, int, str]]) -> str:
    try:
        found = read(path)
    except ValueError as error:
        assert path.name in str(error)
        return "error"
    assert found == expected[: len(found)], "other data, in silence"
    return "unchanged" if found == expected else "prefix"


def test_a_changed_file_is_refused_or_read_up_to_the_change(path: Path) -> None:
    record(path, range(4), seed=1)
    content, expected = path.read_bytes(), read(path)
    found = []
    for seed in range(CHANGES):
        path.write_bytes(fuzz.damaged(content, random.Random(seed)))
        found.append(outcome(path, expected))
    assert found.count("error") > len(found) / 2


def test_any_bit_of_a_frame_that_is_changed_is_an_error_and_not_the_end(path: Path) -> None:
    """A record that says to be longer would hide all after it, which the next run cuts off."""
    record(path, range(2), seed=1)
    content, expected = path.read_bytes(), read(path)
    header = len(records_of(path)[0])
    for bit in range(8 * 32):
        changed = bytearray(content)
        changed[header + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert outcome(path, expected) == "error"
        with pytest.raises(ValueError, match="the file is damaged there"):
            writer(path, 2).close()
            read(path)


def test_lost_moved_and_another_runs_records_are_never_read_in_silence(
    format: Format, tmp_path: Path
) -> None:
    path, other = format.path(tmp_path, 0), format.path(tmp_path / "another", 0)
    record(path, range(4), seed=1)
    record(other, range(4), seed=2, run=OTHER_RUN)
    header, *mine = records_of(path)
    expected, content = read(path), path.read_bytes()
    for moved in records.moved(mine, records_of(other)[1:], random.Random(format.name)):
        path.write_bytes(header + moved)
        # Only a lost last record is missed by no later one.
        said = "prefix" if content.startswith(header + moved) else "error"
        assert outcome(path, expected) == ("unchanged" if header + moved == content else said)


def test_records_out_of_order_are_refused(path: Path) -> None:
    record(path, range(2), seed=1)
    _, [(kind, _, values), *_] = taken_apart(path)
    with open_input(path) as file:
        codec = Records.of(file, path, records.format_of(path))
    first = codec.line + codec.encode(kind, 1, 5, values)
    for number, step, says in ((3, 5, "it is record 3; oth"), (2, 4, "step 4 comes after step 5")):
        path.write_bytes(first + codec.encode(kind, number, step, values))
        with pytest.raises(ValueError, match=rf"record 2 at byte {len(first)}: {says}"):
            read(path)
