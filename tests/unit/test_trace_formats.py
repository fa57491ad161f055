"""Traces of Megatron's tracer and of SmartMoE come back, or are refused for what does not fit."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron_laer.tools.traces import read_trace
from tests.unit.traces import (
    assert_holds,
    megatrons_tracer,
    some_counts,
    write_megatron,
    write_npz,
    write_smartmoe,
)

SHARED_NPZ = Path(__file__).resolve().parents[3] / "shared" / "data" / "smartmoe_trace_dev.npz"


# Megatron's.


def test_megatrons_own_tracer_is_read_with_its_microbatches(tmp_path):
    counts = some_counts(5, most=6)
    counts[..., 3] += 1
    write_megatron(tmp_path, counts)
    trace = read_trace(tmp_path)
    assert trace.layers == ("decoder.0", "decoder.1")
    assert_holds(trace, counts)
    assert_holds(read_trace(tmp_path, ranks=[1]), counts[:, :, :, 1:])
    assert_holds(read_trace(tmp_path / "router_trace_rank1.jsonl"), counts[:, :, :, 1:])
    assert read_trace(tmp_path, num_experts=9).num_experts == 9
    with pytest.raises(ValueError, match=r"rank0\.jsonl, line 1: expert 3 is not in 0\.\.2"):
        read_trace(tmp_path, num_experts=3)


def test_megatrons_top_k_indices_and_heads_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    tracer_type = megatrons_tracer()
    tracer = tracer_type(str(tmp_path), 9, 0, training_mode=True)
    tracer.record_indices([torch.tensor([[0, 2], [2, 1]])], layer_ids=[11])
    tracer.record_indices([torch.tensor([[0, 1], [0, 1]])], layer_ids=[2])
    tracer.record_indices([torch.tensor([[1, 2], [1, 2]])], layer_ids=[0], block="mtp", mtp_idx=1)
    tracer.advance_step(4)
    tracer.flush()
    trace = read_trace(tmp_path)
    assert trace.layers == ("decoder.2", "decoder.11", "mtp.1.0")
    assert trace.step_R.tolist() == [4, 4, 4]
    assert trace.counts_RNE[:, 0].tolist() == [[2, 2, 0], [1, 1, 2], [0, 2, 2]]


def test_a_killed_run_of_megatrons_is_read_up_to_the_last_step_of_all_ranks(tmp_path):
    counts = some_counts(6, most=6)
    write_megatron(tmp_path, counts)
    file = tmp_path / "router_trace_rank1.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    # Cut within step 2, so both ranks have all of steps 0 and 1.
    assert_holds(read_trace(tmp_path, num_experts=4), counts[:2])


def test_ranks_that_routed_other_layers_are_refused(tmp_path):
    write_megatron(tmp_path, some_counts(6, most=6))
    file = tmp_path / "router_trace_rank1.jsonl"
    file.write_text(file.read_text().replace('"layer": 1,', '"layer": 5,'))
    with pytest.raises(
        ValueError, match=r"rank[01]\.jsonl has .*layer decoder\.[15].*one pipeline"
    ):
        read_trace(tmp_path)
    with pytest.raises(ValueError, match=r"of ranks \[2, 3\]; it has \[0, 1\]"):
        read_trace(tmp_path, ranks=[1, 2, 3])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": -1}, "step must be an integer of at least 0, got -1"),
        ({"step": True}, "step must be an integer"),
        ({"layer": 1.5}, "layer must be an integer of at least 0, got 1.5"),
        ({"block": "encoder"}, "block must be 'decoder' or 'mtp', got 'encoder'"),
        ({"num_tokens": 3}, r"shape \(2, 1\) of int64, but num_tokens and topk are \(3, 1\)"),
        ({"top_indices": [[0], [-2]]}, "expert -2 is not in"),
        ({"top_indices": [[0], [40_000]]}, r"expert 40000 is not in 0\.\.32766"),
        ({"top_indices": [[0], [0.5]]}, "of float64"),
        ({"top_indices": [[0], []]}, "inhomogeneous"),
        ({"top_indices": "01"}, "must be a list of lists"),
        ({"top_indices": [], "num_tokens": 10**15, "topk": 10**15}, "but num_tokens and topk are"),
        ([], r"expected an object, got \[\]"),
    ],
)
def test_a_line_of_megatrons_that_does_not_fit_is_quoted(tmp_path, change, problem):
    record = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 0, "rank": 0}
    record |= {"num_tokens": 2, "topk": 1, "top_indices": [[0], [1]]}
    path = tmp_path / "router_trace_rank0.jsonl"
    wrong = record | change if isinstance(change, dict) else change
    path.write_text(json.dumps(record) + "\n" + json.dumps(wrong) + "\n")
    with pytest.raises(ValueError, match=rf"rank0\.jsonl, line 2: .*{problem}"):
        read_trace(tmp_path)


# SmartMoE's.


def test_a_smartmoe_folder_is_read(tmp_path):
    counts = some_counts(7, ranks=12)
    write_smartmoe(tmp_path, counts)
    trace = read_trace(tmp_path)
    assert trace.layers == ("0", "1")
    assert_holds(trace, counts)
    assert_holds(read_trace(tmp_path, ranks=range(10, 12)), counts[:, :, :, 10:])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1:[[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]", "line 2: counts must be whole numbers"),
        ("1:[[1.0, NaN, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]", "line 2: counts must be in 0"),
        ("1:[[1.0, -1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]", "line 2: counts must be in 0"),
        ("0:[[1.0, 1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]", "line 2: layer 0 is there twice"),
        ("1:[[1.0, 1, 0.0], [0.0, 0.0, 0.0]]", r"line 2: counts have shape \(2, 3\)"),
        ("1:[1.0, 2.0]", r"line 2: expected lists \[microbatches\]\[experts\]"),
        ("1;[[1.0]]", "line 2: expected LAYER:COUNTS, got b'1;"),
        ("1:" + "[" * 100_000, "line 2: "),
        ("", "has layers"),
    ],
)
def test_a_smartmoe_line_that_does_not_fit_is_quoted(tmp_path, line, problem):
    write_smartmoe(tmp_path, some_counts(7))
    file = tmp_path / "table_iter2_rank1.log"
    file.write_text(file.read_text().splitlines()[0] + ("\n" + line if line else ""))
    with pytest.raises(ValueError, match=rf"table_iter2_rank1\.log.*{problem}"):
        read_trace(tmp_path)


def test_a_smartmoe_folder_with_a_hole_is_refused(tmp_path):
    write_smartmoe(tmp_path, some_counts(7))
    (tmp_path / "table_iter1_rank0.log").unlink()
    with pytest.raises(ValueError, match=r"table_iter1_rank0\.log is missing"):
        read_trace(tmp_path)
    with pytest.raises(ValueError, match=r"is one file of many; give the folder"):
        read_trace(tmp_path / "table_iter2_rank0.log")


def test_an_npz_is_read(tmp_path):
    counts = some_counts(8)
    write_npz(tmp_path / "x.npz", counts, iteration=np.array([1, 11, 21], dtype=np.int16))
    assert_holds(read_trace(tmp_path / "x.npz"), counts, steps=[1, 11, 21])
    write_npz(tmp_path / "y.npz", counts, compressed=False)
    assert_holds(read_trace(tmp_path / "y.npz"), counts)
    tokens = np.asfortranarray(counts.transpose(0, 1, 3, 2, 4).astype(">i4"))
    np.savez(tmp_path / "z.npz", tokens=tokens)
    assert_holds(read_trace(tmp_path / "z.npz"), counts)


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"other": np.zeros(3)}, r"no array `tokens`, but \['other.npy'\]"),
        ({"tokens": np.zeros((2, 2, 2, 2, 2))}, "of float64, expected integers"),
        ({"tokens": np.array([Bomb()], dtype=object)}, "of object, expected integers"),
        ({"tokens": np.zeros((2, 2), int)}, r"tokens has shape \(2, 2\), expected \[iterations"),
        ({"tokens": np.full((1, 1, 1, 1, 1), -1)}, "must be in 0..2147483647, got -1"),
        (
            {"tokens": np.ones((2, 1, 1, 1, 1), int), "iteration": np.arange(3)},
            r"iteration has shape \(3,\), expected \(2,\)",
        ),
        (
            {"tokens": np.ones((2, 1, 1, 1, 1), int), "iteration": np.array([7, 7])},
            "step 7, layer 0, microbatch 0 is there twice",
        ),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, arrays, problem):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"x\.npz.*{problem}"):
        read_trace(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", ["(9999999999,)", "(2, 2)", "(9,)", "(-1,)"])
def test_an_npz_that_lies_about_its_size_takes_no_memory(tmp_path, shape):
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("tokens.npy", content + bytes(64))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.npz is not a trace in npz"):
        read_trace(tmp_path / "x.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.skipif(not SHARED_NPZ.exists(), reason=f"no trace at {SHARED_NPZ}")
def test_the_published_trace_is_read():
    trace = read_trace(SHARED_NPZ)
    assert trace.counts_RNE.shape == (300 * 16 * 4, 16, 32)
    assert (trace.counts_RNE.sum(axis=2) == 4096).all()
    assert sorted(set(trace.step_R))[:3] == [1, 11, 21]


def test_a_header_of_npz_that_exhausts_its_parser_is_damage(tmp_path):
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"-" * 9000 + b"1,)}\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        size = len(header).to_bytes(2, "little")
        archive.writestr("tokens.npy", b"\x93NUMPY\x01\x00" + size + header)
    with pytest.raises(ValueError, match=r"x\.npz is not a trace in npz"):
        read_trace(tmp_path / "x.npz")
