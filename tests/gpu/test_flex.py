"""Megatron's flex dispatcher on the true buffers of DeepEP and HybridEP, in Megatron's loop.

Two ranks with a card each, which must reach each other's memory. These tests have not been run yet.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_laer.device import CPU_FLAGS
from tests import processes
from tests.text_data import TOKENIZER_FLAGS

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
FLAGS = f"""
    --num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 512
    --seq-length 128 --max-position-embeddings 128 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0
    --untie-embeddings-and-output-weights --bf16 --num-experts 8 --moe-router-topk 2
    --moe-router-load-balancing-type none --moe-router-dtype fp32
    --moe-shared-expert-intermediate-size 256
    --expert-model-parallel-size 2 --expert-parallel-mode fsep --fsep-sharding rows
    --fsep-planner random
    --fsep-capacity 6
    --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --seed 1234 --split 90,10,0
    --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --num-workers 0
    --log-interval 1 --eval-iters 0 --eval-interval 1000
""".split()
FLEX = " --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend "
RECOMPUTE = " --recompute-granularity selective --recompute-modules moe"
OVERLAP = " --moe-shared-expert-overlap"

Train = Callable[[str], list[float]]


@pytest.fixture(autouse=True)
def needs_two_cards() -> None:
    """Import DeepEP here, since every session collects this file."""
    pytest.importorskip("deep_ep")
    if torch.cuda.device_count() < 2:
        pytest.skip("a rank needs a card of its own")


@pytest.fixture(scope="module")
def train(text_data: str) -> Train:
    found: dict[str, list[float]] = {}

    def run(extra: str) -> list[float]:
        if extra not in found:
            flags = ["--data-path", text_data, *TOKENIZER_FLAGS, *extra.split()]
            found[extra] = _run([*FLAGS, *CPU_FLAGS[2:], *flags])  # all but the back end
        return found[extra]

    return run


def _run(flags: list[str]) -> list[float]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(ROOT / "pretrain_gpt.py"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": processes.python_path()},
        cwd=ROOT,
        timeout=900,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-5000:]
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    assert len(losses) == STEPS and all(map(math.isfinite, losses)), output[-5000:]
    return losses


@pytest.mark.parametrize("extra", ["", RECOMPUTE, OVERLAP], ids=["plain", "recompute", "overlap"])
@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_it_trains_as_the_all_to_all_dispatcher_does(
    backend: str, extra: str, train: Train
) -> None:
    import deep_ep

    if backend == "hybridep" and not hasattr(deep_ep, "HybridEPBuffer"):
        pytest.skip("this deep_ep has no HybridEP; its branch hybrid-ep has")
    plain, flex = train(extra), train(f"{extra}{FLEX}{backend}")
    assert flex == pytest.approx(plain, rel=5e-3)
    assert flex[-1] < 0.9 * flex[0]
