"""Training of one model of the convergence benchmark on this rank, with a record of its learning.

Every run starts from the same weights and reads the same batches. Megatron's own loop runs with a
command line, and hooks count the tokens that routers give each expert.

Legend: L layers, N ranks, E experts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_laer.arrays import Int64
from megatron_laer.cpu.training import gather, train
from megatron_laer.device import CPU_FLAGS
from megatron_laer.planner.balance import fsep_tokens_N, max_over_mean, stock_tokens_N
from megatron_laer.session import current_coordinator
from megatron_laer.tools.data import BYTES_TOKENIZER_FLAGS, default_text_sources, prepare_data

RANKS = 2
# Number of validations in a run; tokens of experts are summed over as many windows.
POINTS = 10

MODEL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 64
    --num-experts 16 --moe-router-topk 2 --seq-length 128 --max-position-embeddings 128
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1
    --micro-batch-size 4 --global-batch-size 8 --seed 1234
    --lr 2e-3 --min-lr 2e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
"""

STOCK, FSEP, ROUNDING = "stock", "FSEP", "stock, EP 1"
# Replicas of home experts would not pay in so small a model, so FSEP has rows; all else is by
# default. The last way shows the distance between equal computations: with all
# experts on each rank, only the rounding of sums differs.
WAYS = {
    STOCK: f"--expert-model-parallel-size {RANKS}",
    FSEP: f"--expert-model-parallel-size {RANKS} --expert-parallel-mode fsep --fsep-sharding rows",
    ROUNDING: "--expert-model-parallel-size 1",
}
NO_AUX, AUX = "none", "1e-2"
AUX_LOSSES = {
    NO_AUX: "--moe-router-load-balancing-type none",
    AUX: "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2",
}


@dataclass(frozen=True)
class Run:
    """Result of a run; the first three lists have one entry per step.

    Attributes:
        losses: of training, without the auxiliary loss.
        max_over_mean: tokens of the busiest rank over the mean with the run's own placement, mean
            over layers; 1 without expert parallelism.
        stock_max_over_mean: the same with stock Megatron's placement for the same routing.
        validation: losses over all of the held-out text, after each window of steps.
        expert_tokens: tokens of each expert, by window, layer and expert.
        layouts: the last version of the layouts; 0 for stock.
        fresh_layouts: share of FSEP's passes through a layer that had a layout of their own.
    """

    losses: list[float]
    max_over_mean: list[float]
    stock_max_over_mean: list[float]
    validation: list[float]
    expert_tokens: list[list[list[int]]]
    layouts: int
    fresh_layouts: float
    wall_s: float


@dataclass(frozen=True)
class Text:
    """Data sets of training and of validation, without a common file."""

    train: Path
    held_out: Path

    @classmethod
    def prepare(cls, folder: Path) -> Text:
        """Write the Python standard library's sources, with every 200th held out.

        Tables of encodings are omitted, since they are nearly the same.
        """
        files = [path for path in default_text_sources() if path.parent.name != "encodings"]
        held_out = files[::200]
        text = cls(folder / "train", folder / "held_out")
        kept = [path for path in files if path not in held_out]
        prepare_data(kept, text.train, progress=False)
        prepare_data(held_out, text.held_out, progress=False)
        return text


def command_line(way: str, aux: str, steps: int, text: Text) -> list[str]:
    """Return Megatron's flags for a run of `steps` steps, a multiple of `POINTS`."""
    assert steps % POINTS == 0
    return [
        *MODEL.split(),
        *CPU_FLAGS,
        *BYTES_TOKENIZER_FLAGS,
        *f"--train-data-path {text.train} --valid-data-path {text.held_out}".split(),
        # Megatron 0.19 fails at a full validation of a set that is not one of several.
        *"--full-validation --multiple-validation-sets --num-workers 0".split(),
        *f"--train-iters {steps} --eval-interval {steps // POINTS} --log-interval 100".split(),
        *f"--lr-warmup-iters {steps // 20}".split(),
        *WAYS[way].split(),
        *AUX_LOSSES[aux].split(),
    ]


def measure(flags: Sequence[str], steps: int) -> Run:
    """Train with flags of `command_line`. Collective."""
    started_s = time.monotonic()
    observer = _Observer(steps // POINTS)
    record = train([*flags], observer.after_step, adapt=observer.watch)
    return Run(
        losses=record.losses,
        max_over_mean=observer.max_over_mean,
        stock_max_over_mean=observer.stock_max_over_mean,
        # Megatron validates once more at the end.
        validation=record.eval_losses[:POINTS],
        expert_tokens=[window_LE.tolist() for window_LE in observer.windows],
        layouts=observer.layouts,
        fresh_layouts=observer.fresh / steps,
        wall_s=time.monotonic() - started_s,
    )


@dataclass
class _Observer:
    """Counter of tokens by expert over all ranks, while the model trains."""

    window_steps: int
    max_over_mean: list[float] = field(default_factory=list)
    stock_max_over_mean: list[float] = field(default_factory=list)
    windows: list[Int64] = field(default_factory=list)
    layouts: int = 0
    fresh: float = 0.0
    # Counts of the step's layers, in their order.
    _counts_LE: list[torch.Tensor] = field(default_factory=list)

    def watch(self, model: torch.nn.Module) -> None:
        """Count the choices of the model's routers, without those in validation."""
        from megatron.core.transformer.moe.router import TopKRouter

        def count(router: torch.nn.Module, _: Any, output: tuple[Any, torch.Tensor]) -> None:
            if router.training:
                self._counts_LE.append(output[1].sum(dim=0))

        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(count)

    def after_step(self, _: list[torch.nn.Module]) -> None:
        """Record the step's counts and balance. Collective."""
        from megatron.core import parallel_state

        mine_LE = torch.stack(self._counts_LE).cpu().numpy().astype(np.int64)
        self._counts_LE.clear()
        counts_LNE = np.stack(gather(mine_LE), axis=1)
        if len(self.max_over_mean) % self.window_steps == 0:
            self.windows.append(np.zeros_like(mine_LE))
        self.windows[-1] += counts_LNE.sum(axis=1)
        stock = statistics.fmean(
            max_over_mean(stock_tokens_N(counts_NE)) for counts_NE in counts_LNE
        )
        self.stock_max_over_mean.append(stock)
        placed = parallel_state.get_expert_model_parallel_world_size() > 1
        self.max_over_mean.append(stock if placed else 1.0)
        coordinator = current_coordinator()
        if coordinator is None:
            return
        self.layouts = coordinator.layouts.version
        # Only the planner rank has samples. A step has one microbatch, which is the newest.
        samples = [layer.statistics.take_outcomes()[-1:] for layer in coordinator.layers]
        if all(samples):
            newest = [sample.decision for (sample,) in samples]
            self.max_over_mean[-1] = statistics.fmean(
                max_over_mean(fsep_tokens_N(decision.quotas)) for decision in newest
            )
            self.fresh += statistics.fmean(decision.replanned for decision in newest)
