"""The words that settings choose from: one closed set for each setting that has one.

What they do is decided where they are read; which field takes which set is in `config`.
"""

from __future__ import annotations

from enum import StrEnum


class Choice(StrEnum):
    """Is a closed set of words; a word outside it raises a ValueError that lists them."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"{value!r}: must be one of {', '.join(cls)}")


class ExpertParallelMode(Choice):
    """Says whose expert parallelism runs: Megatron's own, or ours."""

    STANDARD = "standard"
    FSEP = "fsep"


class Split(Choice):
    """Says how a microbatch's tokens are split over an expert's replicas."""

    EXACT = "exact"
    EVEN = "even"


class PlanMode(Choice):
    """Says what a microbatch is computed with.

    That is the planned layout (`forecast`), one made for its very counts after the gate (`exact`),
    the cheaper of the two (`adaptive`), or one made ahead for announced counts (`announced`).
    """

    FORECAST = "forecast"
    EXACT = "exact"
    ADAPTIVE = "adaptive"
    ANNOUNCED = "announced"


class LatePlan(Choice):
    """Says what happens when a plan is not ready in time."""

    KEEP = "keep"
    WAIT = "wait"


class Restore(Choice):
    """Says how long experts stay restored: for one pass of one layer, or for a whole step."""

    LAYER = "layer"
    STEP = "step"


class OverlapScheduler(Choice):
    """Says whether exchanges overlap with compute."""

    ON = "on"
    OFF = "off"


class ExchangeAlgorithm(Choice):
    """Says how an exchange of experts or gradients crosses nodes."""

    FLAT = "flat"
    NODE = "node"


class RestoreAlgorithm(Choice):
    """Names an exchange algorithm, or `auto` for the faster one by the cost model."""

    FLAT = "flat"
    NODE = "node"
    AUTO = "auto"


class TokenExchange(Choice):
    """Says how often a token's hidden state travels.

    That is once per expert and rank that computes it (`rank`), or once per node and then once per
    rank (`node`).
    """

    RANK = "rank"
    NODE = "node"


class TokenExchangeChoice(Choice):
    """Names a token exchange, or `auto` for the faster one by the cost model."""

    RANK = "rank"
    NODE = "node"
    AUTO = "auto"


class GemmBackEnd(Choice):
    """Back end of the slots' GEMMs (`layer/experts/gemm`); `auto` chooses among the proved ones."""

    AUTO = "auto"
    LOOP = "loop"
    STREAMS = "streams"
    TE = "te"
    TORCH = "torch"


class Recompute(Choice):
    """Says what backward computes again of an MoE layer: nothing, all of it, or its compute alone.

    `full` is Megatron's, where tokens are exchanged again; `compute` leaves exchanges out, as
    LAER-MoE's code does.
    """

    NONE = "none"
    FULL = "full"
    COMPUTE = "compute"


class Unproven(Choice):
    """Names what FSEP should run with, but that nobody has run."""

    TE_GRAPHS = "te-graphs"
    DENSE_FP8 = "dense-fp8"


class WireDtype(Choice):
    """Says in which dtype gradients cross nodes."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class FixedPlanner(Choice):
    """Names the planners that need no thread and no broadcast.

    The layout never changes, or it changes at every microbatch in a way that each rank works out
    alone: `random` is no strategy, since strategies are asked once per step.
    """

    STATIC = "static"
    RANDOM = "random"
