"""Planners that know pairs send fewer rows between nodes, and repeat and resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import Record
from megatron_laer.session import current_coordinator
from tests.checkpoints import assert_equal
from tests.parity.flags import command_line
from tests.topical_routing import train_counted

# Rows between nodes cost most, and replicas of home experts less.
ROWS_PAY = Path(__file__).with_name("rows_pay.yaml")
SHARDINGS = {
    "rows": " --fsep-sharding rows",
    "experts": f" --fsep-sharding experts --fsep-capacity 6 --fsep-cluster {ROWS_PAY}",
}
PLANNED = (
    " --expert-parallel-mode fsep --fsep-late-plan wait --fsep-node-size 2"
    " --fsep-token-exchange node --moe-router-topk 4 --ckpt-format torch_dist"
    " --override-opt_param-scheduler"
)
PAIRS = " --fsep-pairs-interval 2"
STEPS = 9


def in_force(_: list[torch.nn.Module]) -> Any:
    """Return version, layouts and shares of rows, and the planner's failures."""
    coordinator = current_coordinator()
    assert coordinator is not None
    layouts = coordinator.layouts
    shares = [layouts.row_share(layer) for layer, _ in enumerate(layouts.layouts)]
    found = [layout.to_list() for layout in layouts.layouts]
    return layouts.version, found, shares, layouts.status.failures


def command(data: str, extra: str, steps: int = STEPS) -> list[str]:
    return command_line(
        data, PLANNED + extra, experts=16, expert_parallel=4, global_batch=16, steps=steps
    )


def run(ranks: RankPools, flags: list[str], topical: bool = True) -> tuple[Record, list[int]]:
    """Return rank 0's record, and the group's rows between nodes in each step."""
    found = ranks(4).run(train_counted, flags, in_force, topical)
    return found[0][0], [sum(of_step) for of_step in zip(*(rows for _, rows in found), strict=True)]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_pairs_lower_the_rows_between_nodes(
    ranks: RankPools, text_data: str, sharding: str
) -> None:
    by_counts, before = run(ranks, command(text_data, SHARDINGS[sharding]))
    by_pairs, after = run(ranks, command(text_data, SHARDINGS[sharding] + PAIRS))
    most = {"rows": 0.8, "experts": 0.95}[sharding]
    assert sum(after[-4:]) < most * sum(before[-4:]), (before, after)
    assert any(share != 1 for share in by_pairs.probes[-1][2]), "no layout is by pairs"
    assert {failures for *_, failures in by_counts.probes + by_pairs.probes} == {0}
    assert by_pairs.losses == pytest.approx(by_counts.losses, rel=1e-4)


@pytest.mark.parametrize("sharding", ["rows", pytest.param("experts", marks=pytest.mark.nightly)])
def test_a_rerun_and_a_resume_have_the_same_bits(
    ranks: RankPools, text_data: str, tmp_path: Path, sharding: str
) -> None:
    """The run stops behind a step with pairs: they are in the checkpoint, not yet in a plan."""
    flags, stop = SHARDINGS[sharding], 5
    pairs = flags + " --fsep-pairs-interval 4"
    saved = f" --save {tmp_path} --save-interval 5"
    whole, rows = run(ranks, command(text_data, pairs))
    first, _ = run(ranks, command(text_data, pairs + saved, steps=stop))
    assert first.losses == whole.losses[:stop] and first.probes == whole.probes[:stop]
    resumed, later = run(ranks, command(text_data, pairs + f" --load {tmp_path}"))
    assert resumed.losses == whole.losses[stop:] and resumed.probes == whole.probes[stop:]
    assert later == rows[stop:]
    assert_equal(resumed.weights, whole.weights)
    shares = [of_step[2] for of_step in whole.probes]
    assert shares[stop - 1] != shares[-1] != [1.0, 1.0]
