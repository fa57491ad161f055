"""The convergence benchmark measures the stated quantities, in a run too short to learn much."""

from __future__ import annotations

import pytest

from benchmarks.convergence_runs import FSEP, NO_AUX, POINTS, STOCK, Text, command_line, measure
from megatron_laer.tools.data import default_text_sources, prepare_data


def test_stock_and_fsep_are_measured_alike(ranks, tmp_path):
    sources = default_text_sources()
    short = min(sources, key=lambda path: abs(path.stat().st_size - 1500))
    text = Text(tmp_path / "train", tmp_path / "held_out")
    prepare_data(sources[:3], text.train, progress=False)
    prepare_data([short], text.held_out, progress=False)
    stock, fsep = (
        ranks(2).run(measure, command_line(way, NO_AUX, POINTS, text), POINTS)[0]
        for way in (STOCK, FSEP)
    )
    # The same weights and batches, before any router choice differs.
    assert fsep.losses == pytest.approx(stock.losses, rel=1e-4)
    assert fsep.validation == pytest.approx(stock.validation, rel=1e-4)
    assert len(stock.losses) == len(stock.validation) == len(stock.expert_tokens) == POINTS
    assert fsep.losses[-1] < fsep.losses[0]
    assert fsep.stock_max_over_mean == pytest.approx(stock.stock_max_over_mean, rel=1e-2)
    for run in (stock, fsep):
        # Every layer routes each of eight sequences' tokens to two experts, in training alone.
        totals = {sum(layer_E) for window in run.expert_tokens for layer_E in window}
        assert totals == {8 * 128 * 2}
    assert stock.max_over_mean == stock.stock_max_over_mean
    assert max(fsep.max_over_mean) < 1.1 < max(fsep.stock_max_over_mean)
    assert stock.layouts == 0 < fsep.layouts
