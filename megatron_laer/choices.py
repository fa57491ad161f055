"""Words that settings choose from; `config` has the field of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

_NUMBER = re.compile("[0-9]{1,18}")


class Choice(StrEnum):
    """Closed set of words; a word outside it raises a ValueError that lists them."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"{value!r}: must be one of {', '.join(cls)}")


class Auto(Choice):
    """Choice of the faster option by the cost model."""

    AUTO = "auto"


class ExpertParallelMode(Choice):
    """Expert parallelism of a run: Megatron's own, or ours."""

    STANDARD = "standard"
    FSEP = "fsep"


class Split(Choice):
    """Split of a microbatch's tokens over an expert's replicas."""

    EXACT = "exact"
    EVEN = "even"


class PlanMode(Choice):
    """Layout of a microbatch: planned (`forecast`) or fresh after the gate (`exact`).

    `adaptive` takes the cheaper of both, and `announced` makes it ahead for announced counts.
    """

    FORECAST = "forecast"
    EXACT = "exact"
    ADAPTIVE = "adaptive"
    ANNOUNCED = "announced"


class Preset(Choice):
    """Published system whose settings FSEP takes; `config.PRESETS` lists them."""

    LAER = "laer"


class LatePlan(Choice):
    """Response to a plan that is not ready in time."""

    KEEP = "keep"
    WAIT = "wait"


class Restore(Choice):
    """Time that experts stay restored: one pass of one layer, or a whole step."""

    LAYER = "layer"
    STEP = "step"


class Verify(Choice):
    """Parts of `--fsep-set verify`; the number N of "one layer of every N-th step" is another."""

    OFF = "off"
    FIRST = "first"
    ALL = "all"
    WARN = "warn"


VERIFY_DEFAULT = "first,100"
_MOST_STEPS = 2**24


@dataclass(frozen=True)
class Verification:
    """Passes that are checked, and the response to a finding.

    Attributes:
        first: whether the first steps and new kinds of exchanges are checked.
        interval: N; None for no layer in turn.
        warns: whether a finding skips the step and puts the layer under stock's placement, where
            it would else stop the run.
    """

    first: bool = False
    all: bool = False
    interval: int | None = None
    warns: bool = False

    @classmethod
    def of(cls, text: str) -> Self:
        """Read parts that are joined by commas; raise ValueError for others."""
        parts = text.split(",")
        words = {Verify(part) for part in parts if not _NUMBER.fullmatch(part)}
        numbers = [int(part) for part in parts if _NUMBER.fullmatch(part)]
        if len(words) + len(numbers) < len(parts) or len(numbers) > 1:
            raise ValueError(f"{text!r}: a part comes twice; leave it out once")
        if numbers and not 1 <= numbers[0] <= _MOST_STEPS:
            raise ValueError(f"{numbers[0]}: must be 1 to {_MOST_STEPS} steps")
        if len(parts) > 1 and Verify.OFF in words:
            raise ValueError(f"{text!r}: off has no other parts; leave them out")
        if Verify.ALL in words and (numbers or Verify.FIRST in words):
            raise ValueError(f"{text!r}: all has the other checks; leave them out")
        interval, warns = (numbers[0] if numbers else None), Verify.WARN in words
        if words == {Verify.WARN} and not numbers:
            return replace(cls.of(VERIFY_DEFAULT), warns=True)
        return cls(Verify.FIRST in words, Verify.ALL in words, interval, warns)

    @property
    def is_on(self) -> bool:
        return self.first or self.all or self.interval is not None


class OverlapScheduler(Choice):
    """Switch of the overlap of exchanges with compute."""

    ON = "on"
    OFF = "off"


class Sharding(Choice):
    """Share of a rank: rows of every expert, or whole experts, of which only replicas move."""

    ROWS = "rows"
    EXPERTS = "experts"


class ExchangeAlgorithm(Choice):
    """Algorithm of exchanges of experts and gradients across nodes."""

    FLAT = "flat"
    NODE = "node"


class TokenExchange(Choice):
    """Copies of a token's hidden state: one per expert (`rank`), or one per node, then per rank."""

    RANK = "rank"
    NODE = "node"


class Dispatch(Choice):
    """Way of tokens: a `TokenExchange`, or once per node by Megatron's flex dispatcher."""

    RANK = "rank"
    NODE = "node"
    FLEX = "flex"


class GemmBackEnd(Choice):
    """Back end of the slots' GEMMs (`layer/experts/gemm`)."""

    LOOP = "loop"
    TE = "te"
    TORCH = "torch"


class Recompute(Choice):
    """Part of an MoE layer that backward computes again.

    `full` is Megatron's, with its token exchanges; `compute` omits them, as LAER-MoE's code does.
    """

    NONE = "none"
    FULL = "full"
    COMPUTE = "compute"


class Unproven(Choice):
    """Feature that was never run with FSEP, and runs only on request."""

    TE_GRAPHS = "te-graphs"
    DENSE_FP8 = "dense-fp8"
    FP8_EXPERTS = "fp8-experts"


class WireDtype(Choice):
    """Dtype in which gradients cross nodes."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class FixedPlanner(Choice):
    """Planner without thread and broadcast: layouts never change, or each rank draws them alone."""

    STATIC = "static"
    RANDOM = "random"
