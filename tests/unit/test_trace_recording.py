"""A recording of our own format is read back whole, and goes on however it ended."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_laer.telemetry.trace_file import TraceWriter
from megatron_laer.tools.traces.fsep import read_recording
from tests.traces import assert_holds, some_counts, write_recording


@given(seed=st.integers(0, 99), most=st.sampled_from([2, 256, 257, 70_000, 2**31]))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recording_gives_back_every_count(tmp_path, seed, most):
    path = tmp_path / "group.trace"
    path.unlink(missing_ok=True)
    counts = some_counts(seed, most=most)
    write_recording(path, counts)
    trace = read_recording(path)
    assert trace.layers == ("decoder.0", "decoder.1")
    assert_holds(trace, counts)


def test_a_count_takes_as_many_bytes_as_its_record_needs(tmp_path):
    sizes = []
    for most in (255, 256, 65_536):
        path = tmp_path / f"{most}.trace"
        write_recording(path, np.full((1, 1, 1, 8, 16), most), layers=["x"])
        sizes.append(path.stat().st_size)
    assert np.diff(sizes).tolist() == [8 * 16, 2 * 8 * 16]


def test_a_recording_cut_anywhere_is_readable_up_to_its_last_complete_record(tmp_path, caplog):
    path = tmp_path / "group.trace"
    counts = some_counts(0, steps=2, layers=1, microbatches=2, most=200)
    write_recording(path, counts)
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    record_bytes = (len(content) - header) // 4
    for length in range(header, len(content)):
        path.write_bytes(content[:length])
        complete = (length - header) // record_bytes
        if complete == 0:
            with pytest.raises(ValueError, match="no complete record"):
                read_recording(path)
        else:
            expected = counts.reshape(-1, *counts.shape[3:])[:complete]
            caplog.clear()
            np.testing.assert_array_equal(read_recording(path).counts_RNE, expected)
            left_out = (length - header) % record_bytes
            said = f"group.trace: its last {left_out} bytes are no whole record and are left out"
            assert (said in caplog.text) == (left_out > 0) == bool(caplog.text)


def test_a_damaged_last_record_is_left_out_and_what_follows_later_is_readable(tmp_path):
    path = tmp_path / "group.trace"
    counts = some_counts(0, steps=2, layers=1, microbatches=1)
    write_recording(path, counts)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_holds(read_recording(path), counts[:1])
    write_recording(path, counts[1:], first_step=2)
    assert_holds(read_recording(path), counts, steps=[0, 2])


def test_a_repeated_record_replaces(tmp_path):
    counts = some_counts(1, steps=3, layers=1, microbatches=1)[:, 0, 0]
    writer = TraceWriter(tmp_path / "x.trace", 2, 4, ["a"])
    for step, record in ((0, 0), (1, 2), (1, 0)):
        writer.append(step, 0, 0, counts[record])
    writer.close()
    trace = read_recording(tmp_path / "x.trace")
    assert trace.step_R.tolist() == [0, 1]
    np.testing.assert_array_equal(trace.counts_RNE, counts[[0, 0]])


def test_steps_that_are_missing_before_those_of_a_resumed_run_are_said(tmp_path, caplog):
    path = tmp_path / "group.trace"
    counts = some_counts(1)
    write_recording(path, counts)
    write_recording(path, counts, first_step=3)
    assert not caplog.text
    write_recording(path, counts, first_step=9)
    assert "nothing is recorded of steps 6 to 8, which an earlier run made" in caplog.text
    assert sorted(set(read_recording(path).step_R)) == [*range(6), 9, 10, 11]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((0, 0, 0, np.zeros((4, 2))), r"shape \(4, 2\), expected \[ranks, experts\] = \(2, 4\)"),
        ((0, 0, 0, np.full((2, 4), -1)), "must be in 0..2147483647, got -1"),
        ((0, 0, 0, np.full((2, 4), 2**31)), "got 2147483648"),
        ((0, 1, 0, np.ones((2, 4), int)), "layer_index must be in 0..0, got 1"),
        ((-1, 0, 0, np.ones((2, 4), int)), "step is out of range, got -1"),
        ((0, 0, 2**32, np.ones((2, 4), int)), "microbatch is out of range"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, arguments, problem):
    writer = TraceWriter(tmp_path / "x.trace", 2, 4, ["a"])
    with pytest.raises(ValueError, match=problem):
        writer.append(*arguments)
    writer.close()
