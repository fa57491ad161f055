"""Traces of Megatron's tracer, of SmartMoE and in CSV are read back."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_laer.tools.traces import read_trace
from tests.traces import (
    assert_holds,
    megatrons_tracer,
    some_counts,
    write_csv,
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


def test_a_smartmoe_folder_is_read(tmp_path):
    counts = some_counts(7, ranks=12)
    write_smartmoe(tmp_path, counts)
    trace = read_trace(tmp_path)
    assert trace.layers == ("0", "1")
    assert_holds(trace, counts)
    assert_holds(read_trace(tmp_path, ranks=range(10, 12)), counts[:, :, :, 10:])
    (tmp_path / "table_iter01_rank0.log").write_text("x")
    with pytest.raises(ValueError, match="are of one rank; move one away"):
        read_trace(tmp_path)


def test_an_npz_is_read(tmp_path):
    counts = some_counts(8)
    write_npz(tmp_path / "x.npz", counts, iteration=np.array([1, 11, 21], dtype=np.int16))
    assert_holds(read_trace(tmp_path / "x.npz"), counts, steps=[1, 11, 21])
    write_npz(tmp_path / "y.npz", counts, compressed=False)
    assert_holds(read_trace(tmp_path / "y.npz"), counts)
    tokens = np.asfortranarray(counts.transpose(0, 1, 3, 2, 4).astype(">i4"))
    np.savez(tmp_path / "z.npz", tokens=tokens)
    assert_holds(read_trace(tmp_path / "z.npz"), counts)


@pytest.mark.skipif(not SHARED_NPZ.exists(), reason=f"no trace at {SHARED_NPZ}")
def test_the_published_trace_is_read():
    trace = read_trace(SHARED_NPZ)
    assert trace.counts_RNE.shape == (300 * 16 * 4, 16, 32)
    assert (trace.counts_RNE.sum(axis=2) == 4096).all()
    assert sorted(set(trace.step_R))[:3] == [1, 11, 21]


@pytest.mark.parametrize("is_wide", [False, True])
def test_a_table_is_read(tmp_path, is_wide):
    counts = some_counts(9, layers=11)
    write_csv(tmp_path / "x.csv", counts, is_wide)
    trace = read_trace(tmp_path / "x.csv")
    assert trace.layers == tuple(map(str, range(11)))
    assert_holds(trace, counts)


def test_a_long_table_may_leave_out_zeros_and_order(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "\ufefftokens,expert,source_rank,microbatch,layer,step\r\n"
        "5,2,1,0,decoder.10,3\r\n\r\n7,0,0,0,decoder.9,3\r\n",
        encoding="utf-8",
    )
    trace = read_trace(path)
    assert trace.layers == ("decoder.9", "decoder.10")
    assert trace.counts_RNE.tolist() == [[[7, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 5]]]


def test_a_table_for_which_memory_does_not_suffice_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("step,layer,microbatch,source_rank,expert,tokens\n0,0,0,0,0,1\n")
    with (
        mock.patch("megatron_laer.files.memory.available_bytes", return_value=99),
        pytest.raises(ValueError, match=r"x\.csv would take about .* GiB of memory, .* part"),
    ):
        read_trace(path)
    with mock.patch("megatron_laer.files.memory.available_bytes", return_value=2**12):
        assert len(read_trace(path)) == 1
