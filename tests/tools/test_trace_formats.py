"""Traces of Megatron's tracer, of SmartMoE and in CSV are read back."""

from __future__ import annotations

import gzip
from unittest import mock

import numpy as np
import pytest

from megatron_laer.telemetry.trace_file import TraceWriter
from megatron_laer.tools.traces import read_trace
from megatron_laer.tools.traces.sets import count_pairs, read_sets
from tests import shared_data
from tests.traces import (
    assert_holds,
    megatrons_tracer,
    some_counts,
    write_csv,
    write_megatron,
    write_npz,
    write_recording,
    write_smartmoe,
)

SHARED_NPZ = shared_data.FOLDER / "smartmoe_trace_dev.npz"


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


@shared_data.needs(SHARED_NPZ.name)
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


SETS = [[0, 2], [1, 2], [0, 3], [0, 2], [3, 1]]
PAIRS_OF_FIRST_TWO = [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0]]
PAIRS_OF_LAST_THREE = [[2, 0, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 2]]


@pytest.mark.parametrize("packed", [False, True], ids=["text", "gzip"])
def test_a_file_of_sets_is_two_steps_with_their_pairs(tmp_path, packed):
    text = "".join(" ".join(map(str, experts)) + "\n" for experts in SETS).encode()
    path = tmp_path / ("run_layer02.E4.k2.txt" + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(text) if packed else text)
    trace = read_trace(path)
    assert trace.layers == ("run_layer02",) and trace.step_R.tolist() == [0, 1]
    assert trace.counts_RNE.tolist() == [[[1, 1, 2, 0]], [[2, 1, 1, 2]]]
    assert trace.pairs.of_layer(0, range(1)).tolist() == PAIRS_OF_FIRST_TWO
    assert trace.pairs.of_layer(0, range(1, 2)).tolist() == PAIRS_OF_LAST_THREE
    assert read_sets(path).tolist() == SETS
    assert read_trace(path, num_experts=6).pairs.of_layer(0).shape == (6, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 2\n1\n", "line 2: expected numbers of experts, got '1'"),
        ("0 2\n1 1\n", "line 2: an expert must come once: '1 1'"),
        ("0 2\n1 2 3\n", "line 2: 3 experts; expected 2 as in line 1"),
        ("0 2\n1 9\n", r"line 2: expert 9 must be in 0\.\.3"),
        ("0 2\n", "has 1 tokens; give at least two"),
    ],
    ids=str,
)
def test_a_bad_file_of_sets_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "sets.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_trace(path, num_experts=4)


def test_a_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "sets.gz"
    path.write_bytes(gzip.compress(b"0 2\n1 2\n" * 50)[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        read_trace(path)


def test_pairs_of_megatrons_traces_are_summed_over_ranks_and_microbatches(tmp_path):
    torch = pytest.importorskip("torch")
    for rank in range(2):
        tracer = megatrons_tracer()(str(tmp_path), 9, rank, training_mode=True)
        tracer.record_indices([torch.tensor(SETS[:2])], layer_ids=[0])
        if rank == 0:
            tracer.record_indices([torch.tensor(SETS[2:])], layer_ids=[0])
        else:
            tracer.record_indices([torch.tensor([[0, 1]])], layer_ids=[0])
        tracer.advance_step(4)
        tracer.flush()
    trace = read_trace(tmp_path, pairs=True)
    assert read_trace(tmp_path).pairs is None
    everything = SETS + SETS[:2] + [[0, 1]]
    assert trace.pairs.of_layer(0).tolist() == count_pairs(np.array(everything), 4).tolist()
    assert trace.pairs.of_layer(0).diagonal().tolist() == trace.counts_RNE.sum((0, 1)).tolist()
    alone = read_trace(tmp_path, ranks=[1], pairs=True)
    assert alone.pairs.of_layer(0).diagonal().tolist() == alone.counts_RNE.sum((0, 1)).tolist()


def test_recorded_pairs_are_read_back_with_the_counts_of_their_step(tmp_path):
    path, counts = tmp_path / "group-0.trace", some_counts(9)
    write_recording(path, counts)
    pairs_EE = np.array(PAIRS_OF_LAST_THREE) * 1000
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
    assert trace.of_ranks([1]).pairs is None and not trace.of_ranks([1]).sets
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(pairs_EE[:1].astype("<u2").tobytes())])  # killed
    assert read_trace(path, pairs=True).pairs is None
    resumed = TraceWriter(path, 2, 4, layers, first_step=4)
    resumed.close()
    assert content.startswith(path.read_bytes()), "the incomplete record is cut off"
