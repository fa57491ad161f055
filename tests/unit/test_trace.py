"""Routing traces: every format round trip, every refusal, and damaged files of every kind."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_laer.releases import ROUTING_TRACES
from megatron_laer.trace import FORMATS, Trace, TraceWriter, read_trace
from megatron_laer.trace.recording import MAGIC, recording_path
from tests.fuzz import bytes_read, damaged
from tests.releases import installed_release

SHARED_NPZ = Path(__file__).resolve().parents[3] / "shared" / "data" / "smartmoe_trace_dev.npz"


def some_counts(seed, steps=3, layers=2, microbatches=2, ranks=2, experts=4, most=300):
    """int64 [steps, layers, microbatches, ranks, experts]."""
    shape = (steps, layers, microbatches, ranks, experts)
    return np.random.default_rng(seed).integers(0, most, shape)


def write_recording(path, counts, first_step=0, layers=None):
    names = layers or [f"decoder.{layer}" for layer in range(counts.shape[1])]
    writer = TraceWriter(path, counts.shape[3], counts.shape[4], names, first_step)
    for step, layer, microbatch in np.ndindex(counts.shape[:3]):
        writer.append(first_step + step, layer, microbatch, counts[step, layer, microbatch])
    writer.close()


def write_smartmoe(folder, counts):
    folder.mkdir(exist_ok=True)
    for step, rank in np.ndindex(counts.shape[0], counts.shape[3]):
        lines = [
            f"{layer}:{json.dumps(counts[step, layer, :, rank].astype(float).tolist())}\n"
            for layer in range(counts.shape[1])
        ]
        (folder / f"table_iter{step}_rank{rank}.log").write_text("".join(lines))


def write_npz(path, counts, compressed=True, **more):
    tokens = np.ascontiguousarray(counts.transpose(0, 1, 3, 2, 4).astype(np.int16))
    (np.savez_compressed if compressed else np.savez)(path, tokens=tokens, **more)


def write_csv(path, counts, is_wide):
    experts = counts.shape[4]
    keys = "step,layer,microbatch,source_rank"
    lines = [
        f"{keys}," + ",".join(f"expert_{e}" for e in range(experts))
        if is_wide
        else f"{keys},expert,tokens"
    ]
    for key in np.ndindex(counts.shape[:4]):
        start = ",".join(map(str, key))
        if is_wide:
            lines.append(start + "," + ",".join(map(str, counts[key])))
        else:
            lines += [f"{start},{e},{counts[key][e]}" for e in range(experts)]
    path.write_text("\n".join(lines) + "\n")


def megatrons_tracer():
    if installed_release() in ROUTING_TRACES.lacked_by():
        pytest.skip(f"Megatron {installed_release()} writes no traces")
    from megatron.core.transformer.moe.router_trace import RouterTracer

    return RouterTracer


def write_megatron(folder, counts, topk=1, training_mode=True):
    """By Megatron's own tracer and its hooks, from tokens that give these counts with top-1."""
    torch = pytest.importorskip("torch")
    tracer_type = megatrons_tracer()
    steps, layers, microbatches, ranks, experts = counts.shape
    for rank in range(ranks):
        tracer = tracer_type(str(folder), steps, rank, training_mode=training_mode)
        hooks = [tracer.make_hook(f"decoder.layers.{layer}.mlp.router") for layer in range(layers)]
        for step in range(steps):
            for microbatch, layer in np.ndindex(microbatches, layers):
                chosen = np.repeat(np.arange(experts), counts[step, layer, microbatch, rank])
                routing_map = torch.zeros(len(chosen), experts, dtype=torch.bool)
                routing_map[torch.arange(len(chosen)), torch.from_numpy(chosen)] = True
                router = SimpleNamespace(topk=topk)
                # Asked of CUDA, which is not there.
                with mock.patch("torch.cuda.is_current_stream_capturing", return_value=False):
                    hooks[layer](router, (), (routing_map.float(), routing_map))
            tracer.advance_step(step)
        tracer.flush()


def assert_holds(trace, counts, steps=None):
    steps = range(len(counts)) if steps is None else steps
    expected = [(steps[i], layer, mb) for i, layer, mb in np.ndindex(counts.shape[:3])]
    assert list(zip(trace.step_R, trace.layer_R, trace.microbatch_R, strict=True)) == expected
    np.testing.assert_array_equal(trace.counts_RNE, counts.reshape(-1, *counts.shape[3:]))


# Our own format.


@given(seed=st.integers(0, 99), most=st.sampled_from([2, 256, 257, 70_000, 2**31]))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recording_gives_back_every_count(tmp_path, seed, most):
    path = tmp_path / "group.trace"
    path.unlink(missing_ok=True)
    counts = some_counts(seed, most=most)
    write_recording(path, counts)
    trace = read_trace(path)
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
                read_trace(path)
        else:
            expected = counts.reshape(-1, *counts.shape[3:])[:complete]
            caplog.clear()
            np.testing.assert_array_equal(read_trace(path).counts_RNE, expected)
            left_out = (length - header) % record_bytes
            said = f"group.trace: its last {left_out} bytes are no whole record and are left out"
            assert (said in caplog.text) == (left_out > 0) == bool(caplog.text)


@pytest.mark.parametrize("rest", [b"\0" * 100, b"\0" * 3])
def test_zeros_at_the_end_are_no_records(tmp_path, rest):
    path = tmp_path / "group.trace"
    counts = some_counts(0)
    write_recording(path, counts)
    path.write_bytes(path.read_bytes() + rest)
    assert_holds(read_trace(path), counts)
    write_recording(path, some_counts(1, steps=1), first_step=3)  # as after a loss of power
    assert_holds(read_trace(path), np.concatenate([counts, some_counts(1, steps=1)]))


def test_a_damaged_last_record_is_left_out_and_what_follows_later_is_readable(tmp_path):
    path = tmp_path / "group.trace"
    counts = some_counts(0, steps=2, layers=1, microbatches=1)
    write_recording(path, counts)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_holds(read_trace(path), counts[:1])
    write_recording(path, counts[1:], first_step=2)
    assert_holds(read_trace(path), counts, steps=[0, 2])


def test_a_huge_tail_is_refused_where_it_begins_and_is_not_read(tmp_path):
    path = tmp_path / "group.trace"
    counts = some_counts(0)
    write_recording(path, counts)
    size = path.stat().st_size
    os.truncate(path, 50 * 10**9)  # takes no place on disk
    before = bytes_read()
    problem = rf"group\.trace, byte {size}: 0 bytes per count, .* a copy of {size} bytes"
    with pytest.raises(ValueError, match=problem):
        read_trace(path)
    with pytest.raises(ValueError, match=problem):
        write_recording(path, counts, first_step=2)
    assert bytes_read() - before < 10**7
    os.truncate(path, size)
    assert_holds(read_trace(path), counts)


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "group.trace"
    write_recording(path, some_counts(0))
    content = bytearray(path.read_bytes())
    content[content.index(b"\n") + 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"group\.trace, record 1 at byte \d+: the checksum"):
        read_trace(path)


def test_a_resumed_run_keeps_the_steps_before_its_own(tmp_path):
    path = recording_path(tmp_path / "new folder", 3)
    assert path.name == "group-3.trace"
    before, after = some_counts(1, steps=4), some_counts(2, steps=2)
    write_recording(path, before)
    write_recording(path, after, first_step=2)
    assert_holds(read_trace(path), np.concatenate([before[:2], after]))


def test_a_resumed_run_leaves_nothing_of_the_steps_that_it_repeats(tmp_path):
    path = tmp_path / "group.trace"
    before, after = some_counts(1, microbatches=3), some_counts(2, steps=1, microbatches=1)
    write_recording(path, before)
    write_recording(path, after, first_step=1)
    trace = read_trace(path)
    assert trace.step_R.tolist() == [0] * 6 + [1] * 2
    np.testing.assert_array_equal(trace.counts_RNE[6:], after.reshape(2, 2, 4))


def test_a_run_killed_within_a_record_is_resumed(tmp_path):
    path = tmp_path / "group.trace"
    before, after = some_counts(1, steps=2), some_counts(2, steps=1)
    write_recording(path, before)
    path.write_bytes(path.read_bytes()[:-5])
    write_recording(path, after, first_step=1)
    assert_holds(read_trace(path), np.concatenate([before[:1], after]))


def test_a_run_killed_within_the_header_is_resumed(tmp_path):
    path = tmp_path / "group.trace"
    counts = some_counts(1)
    write_recording(path, counts)
    path.write_bytes(path.read_bytes()[:20])
    write_recording(path, counts)
    assert_holds(read_trace(path), counts)


def test_a_step_back_rewinds_and_a_repeated_record_replaces(tmp_path):
    counts = some_counts(1, steps=3, layers=1, microbatches=1)[:, 0, 0]
    writer = TraceWriter(tmp_path / "x.trace", 2, 4, ["a"])
    for step, record in ((0, 0), (1, 1), (2, 2), (1, 2), (1, 0)):
        writer.append(step, 0, 0, counts[record])
    writer.close()
    trace = read_trace(tmp_path / "x.trace")
    assert trace.step_R.tolist() == [0, 1]
    np.testing.assert_array_equal(trace.counts_RNE, counts[[0, 0]])
    aside = read_trace(tmp_path / "x.cut-from-1.trace")
    assert aside.step_R.tolist() == [1, 2]
    np.testing.assert_array_equal(aside.counts_RNE, counts[[1, 2]])


def test_a_recording_of_another_shape_is_not_overwritten(tmp_path):
    path = tmp_path / "group.trace"
    write_recording(path, some_counts(1))
    content = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"group\.trace begins with .*\"num_ranks\":2.*another folder"
    ):
        TraceWriter(path, 4, 4, ["decoder.0", "decoder.1"])
    path_of_text = tmp_path / "notes.txt"
    path_of_text.write_text("dear diary")
    with pytest.raises(ValueError, match="dear diary"):
        TraceWriter(path_of_text, 4, 4, ["a"])
    assert path.read_bytes() == content and path_of_text.read_text() == "dear diary"


def test_steps_that_are_missing_before_those_of_a_resumed_run_are_said(tmp_path, caplog):
    path = tmp_path / "group.trace"
    counts = some_counts(1)
    write_recording(path, counts)
    write_recording(path, counts, first_step=3)
    assert not caplog.text
    write_recording(path, counts, first_step=9)
    assert "nothing is recorded of steps 6 to 8, which an earlier run made" in caplog.text
    assert sorted(set(read_trace(path).step_R)) == [*range(6), 9, 10, 11]


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


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"version": 2}, "version 2 of the format; this release reads version 1"),
        ({"num_ranks": 0}, "num_ranks must be an integer in 1"),
        ({"num_experts": 40_000}, "num_experts must be an integer in 1..32767, got 40000"),
        ({"layers": ["a", "a"]}, "layers must all be different"),
        ({"layers": "ab"}, "layers must be names"),
    ],
)
def test_a_header_that_does_not_fit_is_quoted(tmp_path, header, problem):
    path = tmp_path / "x.trace"
    fields = {"format": "megatron_laer-trace", "version": 1, "num_ranks": 1, "num_experts": 2}
    content = json.dumps(fields | {"layers": ["a"]} | header, separators=(",", ":"))
    path.write_text(content + "\n")
    assert content.encode().startswith(MAGIC)
    with pytest.raises(ValueError, match=rf"x\.trace, line 1: {problem}"):
        read_trace(path)


# Other numbers of ranks.


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


# Tables.


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


@pytest.mark.parametrize(
    ("columns", "line", "problem"),
    [
        ("expert,tokens", "0,0,0,0,1,-5", "line 2: tokens must be a whole number.*got '-5'"),
        ("expert,tokens", "0,0,0,0,1,1_0", "line 2: tokens must be a whole number.*got '1_0'"),
        ("expert,tokens", "0,0,0,0,99999,1", r"line 2: expert must be .* 0\.\.32766, got '99999'"),
        ("expert,tokens", "x,0,0,0,1,1", "line 2: step must be a whole number.*got 'x'"),
        ("expert,tokens", "0, ,0,0,1,1", "line 2: the layer is empty"),
        ("expert,tokens", "0,0,0,0,1", "line 2: 5 values, expected 6"),
        ("expert,tokens", "0,0,0,0,1,1\n0,0,0,0,1,2", "source_rank 0, expert 1 is there twice"),
        ("expert,tokens", "0,0,0,0,1,1\n0,0,0,9,1,1", "is of source rank 9, none is of rank 1;"),
        ("expert,tokens", "0,0,0,1000000,1,1", "is of source rank 1000000, none is of rank 0;"),
        (
            "expert,tokens",
            "\n".join(f"{step},0,0,0,32000,1" for step in range(99)),
            "99 records of 1 ranks and 32001 experts would take .* implausible for",
        ),
        ("expert,tokens", "", "the trace holds no records"),
        ("expert,count", "0,0,0,0,1,1", "line 1: the columns are 'step,layer,.*expert,count'"),
        ("expert_0,expert_2", "0,0,0,0,1,1", "line 1: the columns are"),
        ("expert_0", "0,0,0,1,1", "microbatch 0 has 1 lines, expected one for each of the 2"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, columns, line, problem):
    path = tmp_path / "x.csv"
    path.write_text(f"step,layer,microbatch,source_rank,{columns}\n{line}\n")
    with pytest.raises(ValueError, match=rf"x\.csv.*{problem}"):
        read_trace(path)


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


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_may_never_end_is_not_opened(tmp_path, format, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(
        ValueError, match=rf"is (a {kind}|a file); give (a regular file|the folder)"
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


def test_a_header_of_npz_that_exhausts_its_parser_is_damage(tmp_path):
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"-" * 9000 + b"1,)}\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        size = len(header).to_bytes(2, "little")
        archive.writestr("tokens.npy", b"\x93NUMPY\x01\x00" + size + header)
    with pytest.raises(ValueError, match=r"x\.npz is not a trace in npz"):
        read_trace(tmp_path / "x.npz")


# Telling formats apart.


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
    # As a killed run leaves it.
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


def test_a_trace_checks_itself():
    keys = [np.zeros(1, dtype=np.int64)] * 3
    with pytest.raises(ValueError, match="holds no records"):
        Trace(("a",), *[key[:0] for key in keys], np.zeros((0, 1, 1), np.int32))
    with pytest.raises(ValueError, match="layer 0 has no name"):
        Trace((), *keys, np.zeros((1, 1, 1), np.int32))
    with pytest.raises(ValueError, match="must not be negative"):
        Trace(("a",), *keys, np.full((1, 1, 1), -1, np.int32))


# Any bytes at all.


def write_each(folder, counts):
    """A small trace of every format: (path to read, file to damage)."""
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
    """Whether a valid trace came back; anything but it and a ValueError fails the test."""
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
    # Most damage is found; some (a changed digit, a cut recording) is no damage to the format.
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
