"""A table of counts in CSV is read back, or refused with a reason."""

from __future__ import annotations

from unittest import mock

import pytest

from megatron_laer.tools.traces import read_trace
from tests.traces import (
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
