"""Traces of Megatron's tracer and of SmartMoE are read back, or refused with a reason."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron_laer.tools.traces import read_trace
from tests.traces import (
    assert_holds,
    megatrons_tracer,
    some_counts,
    write_megatron,
    write_npz,
    write_smartmoe,
)

SHARED_NPZ = Path(__file__).resolve().parents[3] / "shared" / "data" / "smartmoe_trace_dev.npz"


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


def test_a_smartmoe_folder_is_read(tmp_path):
    counts = some_counts(7, ranks=12)
    write_smartmoe(tmp_path, counts)
    trace = read_trace(tmp_path)
    assert trace.layers == ("0", "1")
    assert_holds(trace, counts)
    assert_holds(read_trace(tmp_path, ranks=range(10, 12)), counts[:, :, :, 10:])


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
