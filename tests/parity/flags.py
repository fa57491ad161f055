"""Command lines of a model small enough for tests and rich enough for routing to move."""

from __future__ import annotations

from megatron_laer.device import CPU_FLAGS
from tests.text_data import TOKENIZER_FLAGS

# Without it, weight gradients are added to main gradients by their product.
UNFUSED = "--no-gradient-accumulation-fusion"

MODEL_FLAGS = """
    --num-layers 2 --hidden-size 48 --num-attention-heads 4 --ffn-hidden-size 64
    --seq-length 48 --max-position-embeddings 48
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
    --expert-tensor-parallel-size 1
    --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1
    --micro-batch-size 2 --seed 1234 --split 90,10,0 --num-workers 0
    --log-interval 1000 --eval-interval 1000 --eval-iters 0
""".split()


def command_line(
    data: str,
    extra: str = "",
    *,
    steps: int,
    experts: int = 8,
    expert_parallel: int = 2,
    global_batch: int = 4,
    without: str = "",
) -> list[str]:
    """Return flags for one run, `without` some of these; `extra` may override any."""
    dropped = without.split()
    flags = [*MODEL_FLAGS, *CPU_FLAGS]
    assert set(dropped) <= set(flags), f"the model has not all of {without}"
    return [
        *(flag for flag in flags if flag not in dropped),
        *TOKENIZER_FLAGS,
        *f"--data-path {data} --num-experts {experts}".split(),
        *f"--expert-model-parallel-size {expert_parallel}".split(),
        *f"--global-batch-size {global_batch} --train-iters {steps}".split(),
        *extra.split(),
    ]
