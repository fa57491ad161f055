"""Trace files are recognised by format and read as a valid trace, or refused."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest

from megatron_laer.telemetry.trace_file import MAGIC, recording_path
from megatron_laer.tools.traces import FORMATS, read_trace
from megatron_laer.tools.traces.records import Trace
from tests.fuzz import damaged
from tests.traces import (
    assert_holds,
    some_counts,
    write_csv,
    write_npz,
    write_recording,
    write_smartmoe,
)


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


@pytest.mark.parametrize("num_ranks", [0, 4, 9])
def test_numbers_of_ranks_without_common_measure_are_refused(tmp_path, num_ranks):
    trace = recorded(tmp_path, some_counts(4, ranks=6))
    with pytest.raises(ValueError, match=rf"for {num_ranks} ranks; use one of \[1, 2, 3, 6\] or a"):
        trace.with_ranks(num_ranks)


def test_a_trace_checks_itself():
    keys = [np.zeros(1, dtype=np.int64)] * 3
    with pytest.raises(ValueError, match="holds no records"):
        Trace(("a",), *[key[:0] for key in keys], np.zeros((0, 1, 1), np.int32))
    with pytest.raises(ValueError, match="layer 0 has no name"):
        Trace((), *keys, np.zeros((1, 1, 1), np.int32))
    with pytest.raises(ValueError, match="must not be negative"):
        Trace(("a",), *keys, np.full((1, 1, 1), -1, np.int32))


def test_a_folder_stands_for_its_only_recording(tmp_path):
    counts = some_counts(1)
    path = recording_path(tmp_path, 0)
    write_recording(path, counts)
    write_recording(path, counts[1:], first_step=1)
    assert (tmp_path / "group-0.cut-from-1.trace").exists()
    shutil.copy(path, tmp_path / ".group-0.trace.0123456789abcdef.tmp")
    assert_holds(read_trace(tmp_path), counts)
    write_recording(recording_path(tmp_path, 1), counts)
    with pytest.raises(ValueError, match=r"recordings of 2 FSEP groups; give one.*group-0\.trace"):
        read_trace(tmp_path)


def test_a_part_of_the_ranks_is_read(tmp_path):
    counts = some_counts(1)
    recorded(tmp_path, counts)
    assert_holds(read_trace(tmp_path / "x.trace", ranks=[1]), counts[:, :, :, 1:])


def write_each(folder, counts):
    """Write a small trace of every format: (path to read, file to damage)."""
    write_recording(folder / "x.trace", counts)
    write_smartmoe(folder / "smartmoe", counts)
    write_npz(folder / "x.npz", counts)
    write_npz(folder / "stored.npz", counts, compressed=False)
    write_csv(folder / "long.csv", counts, is_wide=False)
    write_csv(folder / "wide.csv", counts, is_wide=True)
    (folder / "megatron").mkdir()
    lines = [[] for _ in range(counts.shape[3])]
    for step, layer, microbatch, rank in np.ndindex(counts.shape[:4]):
        tokens = np.repeat(np.arange(counts.shape[4]), counts[step, layer, microbatch, rank])
        record = {"step": step, "block": "decoder", "layer": layer, "topk": 1}
        record |= {"num_tokens": len(tokens), "top_indices": tokens[:, None].tolist()}
        lines[rank].append(json.dumps(record) + "\n")
    for rank, of_rank in enumerate(lines):
        (folder / "megatron" / f"router_trace_rank{rank}.jsonl").write_text("".join(of_rank))
    files = {
        "fsep": "x.trace",
        "npz": "x.npz",
        "npz, stored": "stored.npz",
        "csv, long": "long.csv",
        "csv, wide": "wide.csv",
        "smartmoe": "smartmoe/table_iter1_rank0.log",
        "megatron": "megatron/router_trace_rank0.jsonl",
    }
    return {kind: (folder / file.split("/")[0], folder / file) for kind, file in files.items()}


KINDS = ("fsep", "npz", "npz, stored", "csv, long", "csv, wide", "smartmoe", "megatron")
DAMAGED, RANDOM = 300, 200


def read_or_refuse(path, format=None):
    """Return True for a valid trace and False for a ValueError; anything else fails the test."""
    tracemalloc.reset_peak()
    try:
        trace = read_trace(path, format)
    except ValueError as error:
        assert str(error)
        trace = None
    assert tracemalloc.get_traced_memory()[1] < 2**26
    if trace is not None:
        assert len(trace) > 0 and trace.counts_RNE.min() >= 0
    return trace is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.counts(fuzz_cases=DAMAGED)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    path, file = write_each(tmp_path, some_counts(0, steps=2, most=5))[kind]
    content = file.read_bytes()
    luck = random.Random(kind)
    tracemalloc.start()
    valid = 0
    for _ in range(DAMAGED):
        file.write_bytes(damaged(content, luck))
        valid += read_or_refuse(path)
        valid += read_or_refuse(path, kind.split(",")[0])
    tracemalloc.stop()
    file.write_bytes(content)
    assert len(read_trace(path)) == 8
    # Most damage is found; some (a changed digit, a cut recording) leaves a valid file.
    assert valid < 2 * DAMAGED - 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.counts(fuzz_cases=RANDOM)
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_any_bytes_are_read_or_refused(tmp_path, format):
    luck = random.Random(1)
    starts = [b"", MAGIC, b"PK\x03\x04", b'{"step":', b"step,layer,microbatch,source_rank,"]
    names = {"smartmoe": "table_iter1_rank0.log", "megatron": "router_trace_rank0.jsonl"}
    file = tmp_path / names.get(format, "x")
    tracemalloc.start()
    for _ in range(RANDOM):
        file.write_bytes(luck.choice(starts) + luck.randbytes(luck.choice((0, 1, 20, 300))))
        read_or_refuse(tmp_path if format in names else file, format)
    tracemalloc.stop()
