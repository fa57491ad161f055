"""Layers whose attention, router or dense MLP is graphed compute the same bits as without graphs.

Megatron's own capture and replay run, with calls in place of Transformer Engine's graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import Trainings
from tests.distributed.test_parity import left_and_done
from tests.parity.compare import identical
from tests.parity.row import FSEP
from tests.parity.rows import DIST_OPT, RANDOM, SHARED
from tests.te_graphs import train_graphed

STEPS, WARMUP, LAYERS = 5, 2, 3
GRAPHS = (
    " --fsep-allow-unproven te-graphs --cuda-graph-impl transformer_engine"
    f" --cuda-graph-warmup-steps {WARMUP} --cuda-graph-modules "
)
EVALUATION = " --eval-interval 2 --eval-iters 1"
DENSE_FIRST = f" --num-layers {LAYERS} --moe-layer-freq ([0]*1+[1]*2)"


@pytest.mark.releases
def test_graphs_change_no_number(trained: Trainings) -> None:
    """Nor does an evaluation between steps, of whose forwards none is replayed."""
    # Without a gate of the shared experts, whose gradient is added in another order by graphs.
    flags = SHARED + DENSE_FIRST + DIST_OPT + EVALUATION + FSEP + RANDOM
    options: dict[str, Any] = {"steps": STEPS}
    plain = trained(flags, left_and_done, **options)
    graphed = trained.each(f"{flags}{GRAPHS}attn moe_router mlp", by=train_graphed, **options)
    for record, replayed in graphed:
        assert replayed == LAYERS * 2 * (STEPS - WARMUP)
        assert record.losses == plain.losses and record.grad_norms == plain.grad_norms
        assert record.eval_losses == plain.eval_losses
    assert identical(graphed[0][0], plain)


def test_the_word_has_to_be_said_again_with_a_checkpoints_arguments(
    trained: Trainings, tmp_path: Path
) -> None:
    graphs = f"{FSEP}{RANDOM} --ckpt-format torch_dist{GRAPHS}attn moe_router"
    trained(f"{graphs} --save {tmp_path} --save-interval 3", by=train_graphed)
    again = f"{graphs} --load {tmp_path} --override-opt_param-scheduler --use-checkpoint-args"
    silent = again.replace("--fsep-allow-unproven te-graphs", "")
    for result in trained.ends(silent, by=train_graphed, steps=STEPS):
        assert "give --fsep-allow-unproven te-graphs" in result.traceback
