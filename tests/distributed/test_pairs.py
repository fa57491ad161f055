"""Recorded pairs of experts are those of the sets that Megatron's own tracer records."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_laer.cpu.ranks import RankPools
from megatron_laer.cpu.training import train
from megatron_laer.tools.traces.fsep import read_recording
from megatron_laer.tools.traces.megatron import read_megatron
from tests.parity.flags import command_line
from tests.parity.rows import FULL_RECOMPUTE, PERMUTED
from tests.releases import installed_release

ROWS = " --fsep-sharding rows"
STEPS = 5


@pytest.mark.skipif(installed_release() == "0.18", reason="its Megatron has no tracer")
@pytest.mark.parametrize(
    "flags",
    [ROWS, PERMUTED.format(2), PERMUTED.format(2) + FULL_RECOMPUTE],
    ids=["rows", "homes by a permutation", "homes, recompute"],
)
def test_pairs_of_a_run_are_those_of_its_sets(
    ranks: RankPools, text_data: str, tmp_path: Path, flags: str
) -> None:
    ours, theirs = tmp_path / "fsep", tmp_path / "megatron"
    flags += f" --expert-parallel-mode fsep --fsep-record-trace {ours} --fsep-pairs-interval 2"
    flags += " --fsep-sampled-sets 64"
    flags += f" --moe-routing-trace-path {theirs} --moe-router-topk 3"
    command = command_line(text_data, flags, global_batch=8, steps=STEPS)
    ranks(2).run(train_traced, command)
    recorded = read_recording(ours / "group-0.trace", pairs=True)
    expected = read_megatron(theirs, num_experts=8, pairs=True)
    assert recorded.pairs is not None and expected.pairs is not None
    assert len(expected.layers) == len(recorded.layers) == 2
    assert np.unique(recorded.pairs.step_P).tolist() == [0, 2, 4]
    first = int(expected.step_R.min())
    passes = 2 if "recompute" in flags else 1  # Megatron traces the re-run as well
    for step in range(STEPS):
        for layer in range(2):
            mine_EE = recorded.pairs.of_layer(layer, range(step, step + 1))
            sets_EE = expected.pairs.of_layer(layer, range(first + step, first + step + 1))
            assert sets_EE.sum() > 0
            assert mine_EE.tolist() == (sets_EE // passes * (step % 2 == 0)).tolist()
    layer_of = {name: at for at, name in enumerate(expected.layers)}
    for (step, layer), chosen_TE in recorded.sets.items():
        traced = [
            experts
            for rank in range(2)
            for experts in first_call(theirs, rank, first + step, [*layer_of][layer])
        ]
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


def first_call(folder: Path, rank: int, step: int, layer: str) -> list[list[int]]:
    """Return the experts of each token in the first call of a layer's router in a step."""
    for line in (folder / f"router_trace_rank{rank}.jsonl").read_text().splitlines():
        record = json.loads(line)
        if (record["step"], f"decoder.{record['layer']}") == (step, layer):
            experts: list[list[int]] = record["top_indices"]
            return experts
    raise AssertionError(f"rank {rank} has no step {step} of {layer}")
