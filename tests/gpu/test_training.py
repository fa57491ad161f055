"""Modes that `--fsep-allow-unproven` names, in Megatron's loop with Transformer Engine's layers.

Two ranks. With one card both share it and exchange over gloo, since NCCL needs a card per rank.
With more cards each has its own, and NCCL. These tests have not been run yet.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_laer.layer.experts.gemm import gemm_names, slot_gemm
from tests import processes
from tests.slot_gemm import COLUMNS, ROWS, SPLITS, check_back_end, check_weight_grad
from tests.text_data import TOKENIZER_FLAGS

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARMUP = 8, 3
# Sizes are multiples of 128, as fp8 by blocks needs them. The first layer is dense.
FLAGS = f"""
    --num-layers 3 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 512
    --seq-length 128 --max-position-embeddings 128 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0
    --untie-embeddings-and-output-weights --transformer-impl transformer_engine --bf16
    --num-experts 8 --moe-ffn-hidden-size 512 --moe-router-topk 2 --moe-layer-freq ([0]*1+[1]*2)
    --moe-shared-expert-intermediate-size 256 --moe-router-load-balancing-type none
    --expert-model-parallel-size 2 --expert-parallel-mode fsep --fsep-sharding rows
    --fsep-planner random
    --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --seed 1234 --split 90,10,0
    --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --num-workers 0
    --log-interval 1 --eval-iters 0 --eval-interval 1000 --logging-level 20
    --no-gradient-accumulation-fusion --no-rope-fusion
""".split()
HOMES = " --fsep-sharding experts --fsep-set restore_algorithm="
RECOMPUTE = " --recompute-granularity selective --recompute-modules moe"
GRAPHS = (
    " --fsep-allow-unproven te-graphs --cuda-graph-impl transformer_engine"
    f" --cuda-graph-warmup-steps {WARMUP} --cuda-graph-modules "
)
FP8 = " --fsep-allow-unproven dense-fp8 --fp8-format hybrid --fp8-recipe "
BOTH = " --fsep-allow-unproven te-graphs dense-fp8"  # of several, the last one counts

# Where gloo carries CUDA tensors it accepts no device ids, as on the CPU.
WITH_GLOO = """
import runpy, sys
from megatron_laer.cpu import cuda
cuda._replace_collectives()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

Train = Callable[[str], tuple[list[float], str]]


@pytest.fixture(autouse=True)
def needs_transformer_engine() -> None:
    """Import it here, since every session collects this file."""
    pytest.importorskip("transformer_engine.pytorch")


@pytest.fixture(scope="module")
def train(text_data: str, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return `train(flags)`: the losses of a run of two ranks, and their output."""
    folder = tmp_path_factory.mktemp("training")
    found: dict[str, tuple[list[float], str]] = {}

    def run(extra: str) -> tuple[list[float], str]:
        if extra not in found:
            flags = ["--data-path", text_data, *TOKENIZER_FLAGS, *extra.split()]
            found[extra] = _run(flags, folder / str(len(found)))
        return found[extra]

    return run


def _run(flags: list[str], prefix: Path) -> tuple[list[float], str]:
    has_two = torch.cuda.device_count() > 1
    script = [str(ROOT / "pretrain_gpt.py")] if has_two else ["-c", WITH_GLOO, "pretrain_gpt.py"]
    backend = ["--distributed-backend", "nccl" if has_two else "gloo"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [prefix.with_name(f"{prefix.name}-{rank}.log") for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "PYTHONPATH": processes.python_path(),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank if has_two else 0),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-W", "ignore", *script, *FLAGS, *backend, *flags]
        with log.open("w") as file:
            ranks.append(
                subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
                )
            )
    try:
        for process in ranks:
            process.wait(timeout=900)
    finally:
        for process in ranks:
            process.kill()
    output = "\n".join(log.read_text() for log in logs)
    assert [rank.returncode for rank in ranks] == [0, 0], output[-5000:]
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)]
    assert len(losses) == STEPS and all(map(math.isfinite, losses)), output[-5000:]
    return losses, output


@pytest.mark.parametrize(
    ("modules", "extra"),
    [("attn", ""), ("attn", RECOMPUTE), ("moe_router", ""), ("attn moe_router mlp", "")],
)
def test_graphs_change_losses_by_rounding_at_most(modules: str, extra: str, train: Train) -> None:
    plain, _ = train(extra)
    graphed, output = train(extra + GRAPHS + modules)
    assert "Time spent in CUDA Graphs capture" in output
    assert "--fsep-allow-unproven te-graphs: nobody has run" in output
    assert graphed == pytest.approx(plain, rel=5e-3)
    assert graphed[-1] < 0.9 * graphed[0]


@pytest.mark.parametrize("gemm", ["", " --moe-grouped-gemm"], ids=["sequential", "grouped"])
@pytest.mark.parametrize("algorithm", ["flat", "node"])
def test_experts_at_home_train_as_stock_does(algorithm: str, gemm: str, train: Train) -> None:
    stock, _ = train(f" --expert-parallel-mode standard{gemm}")
    at_home, _ = train(HOMES + algorithm + gemm)
    assert at_home == pytest.approx(stock, rel=5e-3)
    assert at_home[-1] < 0.9 * at_home[0]


def _cannot_compute(recipe: str) -> str | None:
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


@pytest.mark.parametrize("extra", ["", RECOMPUTE], ids=["plain", "recompute"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_of_dense_layers_trains_as_bf16_does(recipe: str, extra: str, train: Train) -> None:
    if why := _cannot_compute(recipe):
        pytest.skip(why)
    plain, _ = train(extra)
    losses, output = train(extra + FP8 + recipe)
    assert "--fsep-allow-unproven dense-fp8: nobody has run" in output
    assert losses != plain, "fp8 had no effect"
    assert losses == pytest.approx(plain, rel=5e-2)
    assert losses[-1] < 0.9 * losses[0]


def test_fp8_and_graphs_train_together(train: Train) -> None:
    if why := _cannot_compute("tensorwise"):
        pytest.skip(why)
    losses, output = train(GRAPHS + "attn moe_router" + FP8 + "tensorwise" + BOTH)
    assert "Time spent in CUDA Graphs capture" in output
    assert losses == pytest.approx(train("")[0], rel=5e-2)


@pytest.mark.parametrize("name", gemm_names())
def test_fp8_does_not_reach_the_products_of_experts(name: str) -> None:
    from transformer_engine.pytorch import fp8_autocast

    if why := _cannot_compute("delayed"):
        pytest.skip(why)
    device, gemm = torch.device("cuda"), slot_gemm(name)
    if (problem := gemm.problem(device, torch.bfloat16, (ROWS, COLUMNS))) is not None:
        pytest.skip(f"{name}: {problem}")
    for tokens_C in SPLITS.values():
        with fp8_autocast(enabled=True):
            check_back_end(gemm, torch.bfloat16, device, tokens_C)
            for out_dtype in (torch.bfloat16, torch.float32):
                check_weight_grad(gemm, torch.bfloat16, out_dtype, device, tokens_C)
