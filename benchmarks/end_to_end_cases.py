"""Configurations that the end-to-end benchmark compares, and the model that they train.

`docs/performance.md` describes them; `end_to_end.py` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import routing
from benchmarks.routing import RoutingShape
from benchmarks.training_run import Routing
from megatron_laer.choices import TokenExchange
from megatron_laer.device import CPU_FLAGS
from megatron_laer.tools.data import BYTES_TOKENIZER_FLAGS

SKEWS = ("fixed", "drifting", "burst")
# Steps of changing workloads: one round of the hot experts, three bursts.
CHANGING = {"W6": 12, "W7": 12}
BIAS_STD = 1.0
SEED = 0

FSEP = "--expert-parallel-mode fsep"
STATIC = f"{FSEP} --fsep-planner static"
# Every routing trains with stock, with FSEP as it chooses, and with rows.
RIVALS = {"stock": "", "fsep": FSEP, "fsep rows": f"{FSEP} --fsep-sharding rows"}
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
MODES = {
    "adaptive": FSEP,
    "rows": f"{FSEP} --fsep-sharding rows",
    "forecast": f"{FSEP} --fsep-plan-mode forecast",
    "exact": f"{FSEP} --fsep-plan-mode exact",
    "restore step": f"{FSEP} --fsep-restore step",
    "scheduler off": f"{FSEP} --fsep-set scheduler=off",
    "recompute": f"{FSEP} {RECOMPUTE}",
    "recompute, scheduler off": f"{FSEP} {RECOMPUTE} --fsep-set scheduler=off",
}
# Baseline of modes that recompute.
STOCK_RECOMPUTE = "stock balanced, recompute"


@dataclass(frozen=True)
class Size:
    """Sizes of the model, and the length of its training.

    A step has one microbatch of `sequences` per rank. The burst has a whole period of bursts in
    place of `steps`, and `warm_up` steps are not counted.
    """

    layers: int
    hidden: int
    ffn: int
    experts: int
    topk: int
    sequence: int
    sequences: int
    warm_up: int
    steps: int
    repeats: int
    # Further model flags of Megatron.
    more: str = ""

    def flags(self, data: str, ranks: int, platform: Sequence[str] = CPU_FLAGS) -> list[str]:
        """Return flags of a run; `platform` has those that depend on the device."""
        return [
            *f"""
            --num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads 8
            --ffn-hidden-size {self.ffn} --moe-ffn-hidden-size {self.ffn}
            --num-experts {self.experts} --moe-router-topk {self.topk}
            --seq-length {self.sequence} --max-position-embeddings {self.sequence}
            --micro-batch-size {self.sequences} --global-batch-size {self.sequences * ranks}
            --expert-model-parallel-size {ranks} --expert-tensor-parallel-size 1
            --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
            --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
            --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
            --lr 1e-4 --min-lr 1e-4 --lr-decay-style constant --clip-grad 1.0 --seed 1234
            --split 90,10,0 --num-workers 0 --log-interval 1000 --eval-interval 1000 --eval-iters 0
            --data-path {data} {self.more}
            """.split(),
            *platform,
            *BYTES_TOKENIZER_FLAGS,
        ]

    def routing_shape(self, ranks: int) -> RoutingShape:
        tokens = self.sequence * self.sequences
        return RoutingShape(self.layers, ranks, self.experts, tokens, self.topk)


# A size at which experts dominate.
FULL = Size(2, 512, 2048, 8, 2, 256, 32, warm_up=2, steps=4, repeats=3)
# Half as wide, with half of the tokens: an eighth of the time.
HALF = Size(2, 256, 1024, 8, 2, 256, 16, warm_up=2, steps=4, repeats=3)
QUICK = Size(2, 128, 512, 8, 2, 64, 16, warm_up=2, steps=4, repeats=2)
# A size at which token exchanges dominate: top-4 of 8, wide rows, and few multiplications per row.
TOKENS = Size(2, 1024, 32, 8, 4, 128, 16, 2, 6, 3, more="--kv-channels 8")
QUICK_TOKENS = Size(2, 256, 32, 8, 4, 64, 16, 2, 4, 2, more="--kv-channels 8")


def by_parts(size: Size) -> Size:
    """Return a size with Megatron's combined 1F1B schedule, bf16, and four microbatches a step."""
    flags = f"--bf16 --overlap-moe-expert-parallel-comm --micro-batch-size {size.sequences // 4}"
    return replace(size, more=f"{size.more} {flags}")


# What the combined schedule runs: traces have one microbatch a step, and it recomputes no layer.
BY_PARTS = ("ideal", "stock, fixed", "fsep, fixed", "fsep balanced, adaptive")


@dataclass(frozen=True)
class Configuration:
    name: str
    flags: str
    routing: Routing
    steps: int


# With top-1 a token has one row either way, so that nodes gain nothing.
TOKENS_OF = {"top-4": "", "top-1": "--moe-router-topk 1 --moe-router-pre-softmax"}


def token_configurations(size: Size) -> list[Configuration]:
    """Return the comparison of token exchanges, with each rank as a node; compare neighbours."""
    balanced, steps = Routing("--moe-router-force-load-balancing"), size.warm_up + size.steps
    return [
        Configuration("ideal", "", balanced, steps),
        *(
            Configuration(
                f"fsep {top}, tokens by {exchange}",
                f"{STATIC} --fsep-node-size 1 --fsep-token-exchange {exchange} {flags}",
                balanced,
                steps,
            )
            for top, flags in TOKENS_OF.items()
            for exchange in TokenExchange
        ),
    ]


def chosen(cases: Sequence[Configuration], parts: Sequence[str]) -> list[Configuration]:
    """Choose the configurations whose names contain one of `parts`, and their baselines.

    Raises ValueError for a part that is in no name.
    """
    for part in parts:
        if not any(part in case.name for case in cases):
            known = "; ".join(case.name for case in cases)
            raise ValueError(f"--only {part!r}: no configuration is called so; there are {known}")
    names = {case.name for case in cases if any(part in case.name for part in parts)}
    names.add("ideal")
    if any("recompute" in name for name in names):
        names.add(STOCK_RECOMPUTE)
    return [case for case in cases if case.name in names]


def configurations(size: Size, ranks: int, scratch: Path) -> list[Configuration]:
    """Return all configurations, and write their traces."""
    shape = size.routing_shape(ranks)
    burst_steps = size.warm_up + routing.BURST_EVERY
    steps = size.warm_up + size.steps
    makers = {"drifting": routing.drifting_trace, "burst": routing.burst_trace}
    skewed = {
        "fixed": Routing(
            f"--moe-router-force-biased {-BIAS_STD}",
            bias=(BIAS_STD, routing.fixed_bias_seed(shape, BIAS_STD)),
        )
    }
    for name, maker in makers.items():
        path = scratch / f"{name}.npy"
        np.save(path, maker(shape, burst_steps + 1, SEED))
        skewed[name] = Routing("--moe-enable-routing-replay", trace=path)
    balanced = Routing("--moe-router-force-load-balancing")

    found = [Configuration("ideal", "", balanced, steps)]
    for skew in SKEWS:
        for kind, flags in (RIVALS | {"fsep static": STATIC}).items():
            long = burst_steps if skew == "burst" else steps
            found.append(Configuration(f"{kind}, {skew}", flags, skewed[skew], long))
    for name in routing.REPLAYED:
        long = size.warm_up + CHANGING.get(name, size.steps)
        path = scratch / f"{name}.npy"
        np.save(path, routing.replayed(name, shape, long + 1))
        workload = Routing("--moe-enable-routing-replay", trace=path)
        found += [
            Configuration(f"{kind}, {name}", flags, workload, long)
            for kind, flags in RIVALS.items()
        ]
    for mode, flags in MODES.items():
        if mode == "recompute":
            found.append(Configuration(STOCK_RECOMPUTE, RECOMPUTE, balanced, steps))
        found.append(Configuration(f"fsep balanced, {mode}", flags, balanced, steps))
    return found
