"""Recordings are read as a valid trace, or refused."""

from __future__ import annotations

import shutil
from unittest import mock

import numpy as np
import pytest

from megatron_laer.telemetry.trace_file import TRACE, TraceWriter
from megatron_laer.tools.traces import read_trace
from tests.traces import assert_holds, some_counts, write_recording


def recorded(tmp_path, counts):
    write_recording(tmp_path / "x.trace", counts)
    return read_trace(tmp_path / "x.trace")


def test_neighbouring_ranks_are_merged(tmp_path):
    counts = some_counts(3, ranks=4)
    merged = recorded(tmp_path, counts).with_ranks(2)
    assert_holds(merged, counts.reshape(*counts.shape[:3], 2, 2, 4).sum(axis=4))


def test_tokens_of_a_rank_are_dealt_out_evenly(tmp_path):
    trace = recorded(tmp_path, some_counts(4, ranks=2, experts=7, most=5))
    dealt = trace.with_ranks(6)
    np.testing.assert_array_equal(dealt.with_ranks(2).counts_RNE, trace.counts_RNE)
    parts_RN3E = dealt.counts_RNE.reshape(len(trace), 2, 3, 7)
    assert np.ptp(parts_RN3E, axis=2).max() <= 1
    assert np.ptp(parts_RN3E.sum(axis=3), axis=2).max() <= 1


def test_a_folder_stands_for_its_only_recording(tmp_path):
    counts = some_counts(1)
    path = TRACE.path(tmp_path, 0)
    write_recording(path, counts)
    write_recording(path, counts[1:], first_step=1)
    assert (tmp_path / "group-0.cut-from-1.trace").exists()
    shutil.copy(path, tmp_path / ".group-0.trace.megatron_laer.tmp")
    assert_holds(read_trace(tmp_path), counts)
    write_recording(TRACE.path(tmp_path, 1), counts)
    with pytest.raises(ValueError, match=r"recordings of 2 FSEP groups; give one.*group-0\.trace"):
        read_trace(tmp_path)


def test_a_trace_for_which_memory_does_not_suffice_is_refused(tmp_path):
    recorded(tmp_path, some_counts(1))
    with (
        mock.patch("megatron_laer.files.memory.available_bytes", return_value=99),
        pytest.raises(ValueError, match=r"12 records .* GiB of memory, .* part"),
    ):
        read_trace(tmp_path / "x.trace")


def test_recorded_pairs_are_read_back_with_the_counts_of_their_step(tmp_path):
    path, counts = tmp_path / "group-0.trace", some_counts(9)
    write_recording(path, counts)
    pairs_EE = np.array([[2, 0, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 2]]) * 1000
    layers = ["decoder.0", "decoder.1"]
    writer = TraceWriter(path, 2, 4, layers, first_step=3)
    writer.append(3, 1, 0, counts[0, 0, 0])
    writer.append_pairs(3, 1, pairs_EE)
    chosen_TE = np.array([[True, False, True, False], [False, True, False, True]])
    writer.append_sets(3, 1, chosen_TE)
    writer.append(3, 0, 0, counts[0, 0, 0])
    writer.close()
    trace = read_trace(path, pairs=True)
    assert trace.counts_RNE[:-2].tolist() == counts.reshape(-1, *counts.shape[3:]).tolist()
    assert trace.step_R[-2:].tolist() == [3, 3]
    assert {key: its_TE.tolist() for key, its_TE in trace.sets.items()} == {
        (3, 1): chosen_TE.tolist()
    }
    assert trace.pairs.of_layer(1).tolist() == pairs_EE.tolist()
    assert not trace.pairs.of_layer(0).any() and not trace.pairs.of_layer(1, range(3)).any()
    assert read_trace(path).pairs is None and not read_trace(path).sets
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(pairs_EE[:1].astype("<u2").tobytes())])  # killed
    assert read_trace(path, pairs=True).pairs is None
    resumed = TraceWriter(path, 2, 4, layers, first_step=4)
    resumed.close()
    assert content.startswith(path.read_bytes()), "the incomplete record is cut off"
