"""Layers whose attention, router or dense MLP is graphed compute the same as without graphs.

Megatron's own capture and replay run, with calls in place of Transformer Engine's graphs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_laer.cpu.ranks import Raised, RankPools
from megatron_laer.cpu.training import train
from tests.checkpoints import iteration_folder
from tests.distributed.test_parity import left_and_done
from tests.parity.flags import command_line
from tests.parity.rows import DIST_OPT, MOE_RECOMPUTE, PIPELINE, RANDOM, SHARED
from tests.te_graphs import train_graphed

STEPS, WARMUP = 5, 2
FSEP = " --expert-parallel-mode fsep --fsep-sharding rows" + RANDOM
WORD = " --fsep-allow-unproven te-graphs"
GRAPHS = (
    f"{WORD} --cuda-graph-impl transformer_engine"
    f" --cuda-graph-warmup-steps {WARMUP} --cuda-graph-modules "
)
LAYERNORM = " --recompute-granularity selective --recompute-modules layernorm"
EVALUATION = " --eval-interval 2 --eval-iters 1"
DENSE_FIRST = " --num-layers 3 --moe-layer-freq ([0]*1+[1]*2)"


@pytest.mark.parametrize(
    ("modules", "size", "flags", "replays"),
    [
        ("attn", 2, MOE_RECOMPUTE + SHARED + EVALUATION, 2 * 2),
        # Without a gate of the shared experts, whose gradient is added in another order by graphs.
        pytest.param(
            *("attn moe_router mlp", 2, SHARED + DENSE_FIRST + DIST_OPT, 3 * 2),
            marks=pytest.mark.releases,
        ),
        ("attn moe_router", 4, PIPELINE + " --num-layers 4", 2 * 2),
        ("attn moe_router moe_preprocess", 2, SHARED + DIST_OPT, 2 * 2),
        ("moe_router moe_preprocess", 2, LAYERNORM, 2 * 2),
    ],
)
def test_graphs_change_no_number(
    modules: str, size: int, flags: str, replays: int, ranks: RankPools, text_data: str
) -> None:
    pipelines = 2 if PIPELINE in flags else 1
    command = command_line(text_data, flags + FSEP, global_batch=4 * size // pipelines, steps=STEPS)
    plain = ranks(size).run(train, command, left_and_done)[0]
    graphed = ranks(size).run(train_graphed, [*command, *(GRAPHS + modules).split()])
    for record, replayed in graphed:
        assert replayed == replays * (STEPS - WARMUP)
        assert record.losses == plain.losses and record.grad_norms == plain.grad_norms
        assert record.eval_losses == plain.eval_losses
    record, _ = graphed[0]
    assert record.weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        assert torch.equal(record.weights[name], weight), name


def saved_words(folder: Path) -> list[tuple[str, str]]:
    """Return the allowed words in a checkpoint's arguments, with their types."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    args = load_common_state_dict(str(folder))["args"]
    return [(type(word).__name__, word) for word in args.fsep_allow_unproven]


def test_checkpoints_keep_the_word_and_it_has_to_be_said_again(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    def command(steps: int, extra: str) -> list[str]:
        return command_line(text_data, FSEP + " --ckpt-format torch_dist" + extra, steps=steps)

    graphs = GRAPHS + "attn moe_router"
    plain = ranks(2).run(train, command(5, ""))[0]
    saves = f"{graphs} --save {tmp_path} --save-interval 3"
    first, _ = ranks(2).run(train_graphed, command(3, saves))[0]
    assert first.losses == plain.losses[:3]
    saved = ranks(2).run(saved_words, iteration_folder(tmp_path, 3))
    assert saved == [[("str", "te-graphs")]] * 2, "plain words, to be read without us"

    go_on = f" --load {tmp_path} --override-opt_param-scheduler"
    assert ranks(2).run(train, command(5, go_on))[0].losses == plain.losses[3:]
    second, _ = ranks(2).run(train_graphed, command(5, go_on + graphs))[0]
    assert second.losses == plain.losses[3:]
    silent = (
        go_on + " --use-checkpoint-args" + graphs.replace("--fsep-allow-unproven te-graphs", "")
    )
    for result in ranks(2).run_raw(train_graphed, command(5, silent)):
        assert isinstance(result, Raised)
        assert "give --fsep-allow-unproven te-graphs" in result.traceback
