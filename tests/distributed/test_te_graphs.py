"""Layers whose attention, router or dense MLP is graphed compute what they compute without graphs.

Megatron's own capture and replay run, with calls in place of Transformer Engine's graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_laer.testing.ranks import RankPool
from megatron_laer.testing.training import train
from tests.distributed.test_parity import check_nothing_left
from tests.parity.flags import command_line
from tests.parity.rows import DIST_OPT, MOE_RECOMPUTE, PIPELINE, RANDOM
from tests.te_graphs import train_graphed

STEPS, WARMUP = 5, 2
FSEP = " --expert-parallel-mode fsep" + RANDOM
GRAPHS = (
    " --fsep-allow-unproven te-graphs --cuda-graph-impl transformer_engine"
    f" --cuda-graph-warmup-steps {WARMUP} --cuda-graph-modules "
)
SHARED = " --moe-shared-expert-intermediate-size 32"
EVALUATION = " --eval-interval 2 --eval-iters 1"
DENSE_FIRST = " --num-layers 3 --moe-layer-freq ([0]*1+[1]*2)"


@pytest.mark.parametrize(
    ("modules", "size", "flags", "replays"),
    [
        ("attn", 2, SHARED + EVALUATION, 2 * 2),
        ("moe_router", 2, SHARED + " --moe-shared-expert-gate", 2 * 2),
        pytest.param(
            "attn moe_router mlp",
            2,
            SHARED + DENSE_FIRST + DIST_OPT,
            3 * 2,
            marks=pytest.mark.releases,
        ),
        ("mlp", 2, DENSE_FIRST, 1 * 2),
        ("attn", 2, MOE_RECOMPUTE, 2 * 2),
        ("attn moe_router", 2, " --moe-shared-expert-overlap" + SHARED + DIST_OPT, 2 * 2),
        ("attn moe_router", 4, PIPELINE + " --num-layers 4", 2 * 2),
    ],
)
def test_graphs_change_no_number(
    modules: str,
    size: int,
    flags: str,
    replays: int,
    ranks: Callable[[int], RankPool],
    text_data: str,
) -> None:
    pipelines = 2 if PIPELINE in flags else 1
    command = command_line(
        text_data,
        experts=8,
        expert_parallel=2,
        global_batch=4 * size // pipelines,  # two microbatches
        steps=STEPS,
        extra=flags + FSEP,
    )
    plain = ranks(size).run(train, command, check_nothing_left)[0]
    graphed = ranks(size).run(train_graphed, [*command, *(GRAPHS + modules).split()])
    for record, replayed in graphed:
        assert replayed == replays * (STEPS - WARMUP)
        assert record.losses == plain.losses and record.grad_norms == plain.grad_norms
        assert record.eval_losses == plain.eval_losses
    record, _ = graphed[0]
    assert record.weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        assert torch.equal(record.weights[name], weight), name
