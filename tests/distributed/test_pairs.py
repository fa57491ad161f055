"""Recorded pairs of experts are those of the sets that Megatron's own tracer records."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_laer.arrays import Int64
from megatron_laer.cpu.training import train
from megatron_laer.tools.traces.reading import read_recording
from tests.distributed.conftest import Trainings
from tests.parity.rows import FULL_RECOMPUTE, PERMUTED
from tests.releases import installed_release
from tests.traces import pairs_of

ROWS = " --fsep-sharding rows"
STEPS = 5


@pytest.mark.skipif(installed_release() == "0.18", reason="its Megatron has no tracer")
@pytest.mark.parametrize(
    "flags",
    [ROWS, PERMUTED.format(2) + FULL_RECOMPUTE],
    ids=["rows", "homes by a permutation, recompute"],
)
def test_pairs_of_a_run_are_those_of_its_sets(
    trained: Trainings, tmp_path: Path, flags: str
) -> None:
    ours, theirs = tmp_path / "fsep", tmp_path / "megatron"
    flags += f" --expert-parallel-mode fsep --fsep-record {ours} trace --fsep-set pairs_interval=2"
    flags += " --fsep-set sampled_sets=64"
    flags += f" --moe-routing-trace-path {theirs} --moe-router-topk 3"
    trained(flags, by=train_traced, steps=STEPS)
    recorded = read_recording(ours / "group-0.trace", pairs=True)
    calls = traced_calls(theirs)
    assert recorded.pairs is not None
    assert len({layer for _, layer in calls}) == len(recorded.layers) == 2
    assert np.unique(recorded.pairs.step_P).tolist() == [0, 2, 4]
    first = min(step for step, _ in calls)
    passes = 2 if "recompute" in flags else 1  # Megatron traces the re-run as well
    for step in range(STEPS):
        for layer in range(2):
            mine_EE = recorded.pairs.of_layer(layer, range(step, step + 1))
            sets_EE = pairs_of(np.concatenate(calls[first + step, layer]), 8)
            assert sets_EE.sum() > 0
            assert mine_EE.tolist() == (sets_EE // passes * (step % 2 == 0)).tolist()
    for (step, layer), chosen_TE in recorded.sets.items():
        of_ranks = calls[first + step, layer]
        # Each rank's first microbatch.
        traced = [*of_ranks[0].tolist(), *of_ranks[len(of_ranks) // 2].tolist()]
        assert len(chosen_TE) == 64 and step % 2 == 0
        found = [np.flatnonzero(chosen_E).tolist() for chosen_E in chosen_TE]
        assert found == [sorted(experts) for experts in traced[::3]]
    assert len(recorded.sets) == 6
    counts_E = recorded.counts_RNE[(recorded.step_R == 2) & (recorded.layer_R == 1)].sum((0, 1))
    assert recorded.pairs.of_layer(1, range(2, 3)).diagonal().tolist() == counts_E.tolist()


def train_traced(flags: list[str]) -> None:
    """Train with a tracer of this run, of which Megatron has one for each process."""
    from megatron.core.transformer.moe import router_trace

    with mock.patch.object(router_trace, "_MOE_ROUTER_TRACER", None):
        train(flags)
        router_trace.get_moe_router_tracer().flush()


def traced_calls(folder: Path) -> dict[tuple[int, int], list[Int64]]:
    """Return the experts of each token by step and layer, rank after rank, call after call."""
    calls: dict[tuple[int, int], list[Int64]] = {}
    for rank in range(2):
        for line in (folder / f"router_trace_rank{rank}.jsonl").read_text().splitlines():
            record = json.loads(line)
            expert_TK = np.array(record["top_indices"], dtype=np.int64)
            calls.setdefault((record["step"], record["layer"]), []).append(expert_TK)
    return calls
