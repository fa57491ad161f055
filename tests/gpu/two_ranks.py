"""Two ranks in Megatron's loop: with a card each over NCCL, or both on the only card by gloo.

NCCL needs a card per rank.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests import processes
from tests.text_data import TOKENIZER_FLAGS

_ROOT = Path(__file__).resolve().parents[2]
_STEPS = 8
# Sizes are multiples of 128, as fp8 by blocks needs them.
_FLAGS = f"""
    --num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 512
    --seq-length 128 --max-position-embeddings 128 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0
    --untie-embeddings-and-output-weights --bf16 --num-experts 8 --moe-router-topk 2
    --moe-shared-expert-intermediate-size 256 --moe-router-load-balancing-type none
    --expert-model-parallel-size 2
    --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --seed 1234 --split 90,10,0
    --micro-batch-size 2 --global-batch-size 8 --train-iters {_STEPS} --num-workers 0
    --log-interval 1 --eval-iters 0 --eval-interval 1000 --logging-level 20
""".split()
_FSEP = "--expert-parallel-mode fsep --fsep-sharding rows --fsep-planner random".split()
Train = Callable[[str], tuple[list[float], str]]


def words_of(flags: Sequence[str]) -> list[str]:
    """Return a run's words with these flags; stock's has no flag of FSEP's."""
    return [*_FLAGS, *([] if "standard" in flags else _FSEP), *flags]


def trainer(data: str) -> Train:
    """Return `train(flags)`: the losses of a run, each made once, and its output."""
    found: dict[str, tuple[list[float], str]] = {}

    def train(extra: str) -> tuple[list[float], str]:
        if extra not in found:
            found[extra] = _run(["--data-path", data, *extra.split()])
        return found[extra]

    return train


def cannot_compute(recipe: str) -> str | None:
    """Return the reason why this card cannot compute in fp8 by this recipe; None if it can."""
    from transformer_engine.pytorch import fp8

    asked = {
        "delayed": fp8.check_fp8_support,
        "tensorwise": fp8.check_fp8_support,
        "blockwise": fp8.check_fp8_block_scaling_support,
        "mxfp8": fp8.check_mxfp8_support,
    }
    can, why = asked[recipe]()
    return None if can else why


def _run(flags: list[str]) -> tuple[list[float], str]:
    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 tests/gpu/rank.py".split()
    words = words_of(["--distributed-backend", backend, *TOKENIZER_FLAGS, *flags])
    result = processes.run(
        [sys.executable, *launcher, *words],
        timeout_s=900,
        env=os.environ | {"PYTHONPATH": processes.python_path(), "PYTHONWARNINGS": "ignore"},
        cwd=_ROOT,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-5000:]
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    assert len(losses) == _STEPS and all(map(math.isfinite, losses)), output[-5000:]
    return losses, output
