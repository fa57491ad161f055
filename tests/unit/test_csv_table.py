"""A table of counts in CSV comes back, or is refused for what does not fit."""

from __future__ import annotations

from unittest import mock

import pytest

from megatron_laer.tools.traces import read_trace
from tests.unit.traces import (
    assert_holds,
    some_counts,
    write_csv,
)


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
        ("expert,tokens", "0,0,0,0,1,-5", "row 1: tokens must be a whole number.*got -5"),
        ("expert,tokens", "0,0,0,0,1,1_0", "row 1: '1_0' is no whole number"),
        ("expert,tokens", "0,0,0,0,99999,1", r"row 1: expert must be .* 0\.\.32766, got 99999"),
        ("expert,tokens", "x,0,0,0,1,1", "row 1: 'x' is no whole number"),
        ("expert,tokens", "0, ,0,0,1,1", "row 1: the layer is empty"),
        ("expert,tokens", "0,0,0,0,1", "requires 6 columns but 5 were found"),
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
