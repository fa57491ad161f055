"""Trace files are recognised by format and read as a valid trace, or refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path
from unittest import mock

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


def test_neighbouring_ranks_are_merged(tmp_path):
    counts = some_counts(3, ranks=4)
    write_recording(tmp_path / "x.trace", counts)
    merged = read_trace(tmp_path / "x.trace").with_ranks(2)
    assert_holds(merged, counts.reshape(*counts.shape[:3], 2, 2, 4).sum(axis=4))


def test_tokens_of_a_rank_are_dealt_out_evenly(tmp_path):
    counts = some_counts(4, ranks=2, experts=7, most=5)
    write_recording(tmp_path / "x.trace", counts)
    trace = read_trace(tmp_path / "x.trace")
    dealt = trace.with_ranks(6)
    np.testing.assert_array_equal(dealt.with_ranks(2).counts_RNE, trace.counts_RNE)
    parts_RN3E = dealt.counts_RNE.reshape(len(trace), 2, 3, 7)
    assert np.ptp(parts_RN3E, axis=2).max() <= 1
    assert np.ptp(parts_RN3E.sum(axis=3), axis=2).max() <= 1


@pytest.mark.parametrize("num_ranks", [0, 4, 9])
def test_numbers_of_ranks_without_common_measure_are_refused(tmp_path, num_ranks):
    write_recording(tmp_path / "x.trace", some_counts(4, ranks=6))
    with pytest.raises(ValueError, match=rf"for {num_ranks} ranks; use one of \[1, 2, 3, 6\] or a"):
        read_trace(tmp_path / "x.trace").with_ranks(num_ranks)


def test_a_trace_checks_itself():
    keys = [np.zeros(1, dtype=np.int64)] * 3
    with pytest.raises(ValueError, match="holds no records"):
        Trace(("a",), *[key[:0] for key in keys], np.zeros((0, 1, 1), np.int32))
    with pytest.raises(ValueError, match="layer 0 has no name"):
        Trace((), *keys, np.zeros((1, 1, 1), np.int32))
    with pytest.raises(ValueError, match="must not be negative"):
        Trace(("a",), *keys, np.full((1, 1, 1), -1, np.int32))


def test_what_is_no_trace_is_refused_with_the_formats_there_are(tmp_path):
    with pytest.raises(ValueError, match="'nowhere' does not exist"):
        read_trace(Path("nowhere"))
    (tmp_path / "x").write_text("hello")
    with pytest.raises(ValueError, match=r"begins with b'hello', which no trace format does"):
        read_trace(tmp_path / "x")
    with pytest.raises(ValueError, match="holds no trace: no router_trace"):
        read_trace(tmp_path)
    with pytest.raises(ValueError, match="unknown trace format 'xml'; use one of fsep, megatron"):
        read_trace(tmp_path / "x", "xml")
    with pytest.raises(ValueError, match="number of experts must be in 1"):
        read_trace(tmp_path / "x", num_experts=0)


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


def test_ranks_and_experts_are_checked_for_every_format(tmp_path):
    counts = some_counts(1)
    write_recording(tmp_path / "x.trace", counts)
    assert_holds(read_trace(tmp_path / "x.trace", ranks=[1]), counts[:, :, :, 1:])
    with pytest.raises(ValueError, match=r"source ranks \[2\] are not in the trace.*0 to 1"):
        read_trace(tmp_path / "x.trace", ranks=[1, 2])
    with pytest.raises(ValueError, match="has 4 experts, not 8"):
        read_trace(tmp_path / "x.trace", num_experts=8)


@pytest.mark.parametrize("name", ["x.csv", "router_trace_rank0.jsonl"])
def test_an_endless_line_is_refused_without_reading_on(tmp_path, name):
    path = tmp_path / name
    path.write_text("step,layer,microbatch,source_rank,expert,tokens\n" if "csv" in name else "")
    os.truncate(path, 2**36)
    format = "csv" if "csv" in name else "megatron"
    with (
        mock.patch("megatron_laer.files.memory.available_bytes", return_value=2**50),
        pytest.raises(ValueError, match=r"line [12]: longer than 33,554,432 characters"),
    ):
        read_trace(path, format)


def test_pipes_among_the_files_of_a_folder_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "router_trace_rank0.jsonl")
    with pytest.raises(ValueError, match=r"rank0\.jsonl' is a pipe"):
        read_trace(tmp_path, "megatron")
    os.mkfifo(tmp_path / "table_iter0_rank0.log")
    with pytest.raises(ValueError, match=r"rank0\.log' is a pipe"):
        read_trace(tmp_path, "smartmoe")


@pytest.mark.parametrize(
    "names",
    [
        ("router_trace_rank0.jsonl", "router_trace_rank00.jsonl"),
        ("table_iter1_rank0.log", "table_iter01_rank0.log"),
    ],
)
def test_two_files_of_one_rank_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="are of one rank; move one away"):
        read_trace(tmp_path)


def write_each(folder, counts):
    """Write a small trace of every format: (path to read, file to damage)."""
    (folder / "megatron").mkdir()
    write_recording(folder / "x.trace", counts)
    write_smartmoe(folder / "smartmoe", counts)
    write_npz(folder / "x.npz", counts)
    write_npz(folder / "stored.npz", counts, compressed=False)
    write_csv(folder / "long.csv", counts, is_wide=False)
    write_csv(folder / "wide.csv", counts, is_wide=True)
    for rank in range(counts.shape[3]):
        with (folder / "megatron" / f"router_trace_rank{rank}.jsonl").open("w") as file:
            for step, layer, microbatch in np.ndindex(counts.shape[:3]):
                tokens = np.repeat(
                    np.arange(counts.shape[4]), counts[step, layer, microbatch, rank]
                )
                record = {"step": step, "block": "decoder", "layer": layer, "topk": 1}
                record |= {"num_tokens": len(tokens), "top_indices": tokens[:, None].tolist()}
                file.write(json.dumps(record) + "\n")
    return {
        "fsep": (folder / "x.trace", folder / "x.trace"),
        "npz": (folder / "x.npz", folder / "x.npz"),
        "npz, stored": (folder / "stored.npz", folder / "stored.npz"),
        "csv, long": (folder / "long.csv", folder / "long.csv"),
        "csv, wide": (folder / "wide.csv", folder / "wide.csv"),
        "smartmoe": (folder / "smartmoe", folder / "smartmoe" / "table_iter1_rank0.log"),
        "megatron": (folder / "megatron", folder / "megatron" / "router_trace_rank0.jsonl"),
    }


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
