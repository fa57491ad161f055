"""One combination of the parity table: the command lines of its two stock runs and of FSEP's."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_laer.cpu.training import Adapt
from tests.parity.compare import Distance
from tests.parity.flags import UNFUSED, command_line

# Enough for a wrong gradient to show, by day and at night. Rows of common settings train longer at
# night, so that rounding adds up as it does in training.
STEPS_BY_DAY = 6
STEPS = 12
LONG = 50
# Graphs of attention with another feature are known to go wrong after 80 steps only.
LONGEST = 200

FSEP = " --expert-parallel-mode fsep --fsep-sharding rows"
AT_HOME = " --fsep-sharding experts"

FP32_BOUND = Distance(grads=1e-6, losses=1e-5, norms=1e-4, weights=1e-4, logged=1e-5)
# bf16 keeps 8 bits: a rounding is 4e-3 relative. Two layouts sum the same gradients in another
# order, which after some steps of Adam decides the rounding of many weights.
BF16_BOUND = Distance(grads=2e-2, losses=1e-2, norms=1e-1, weights=5e-2, logged=1e-2)
# An fp8 value keeps 3 bits, and the scale of a slot's tokens depends on which of them are there: so
# the floor between two layouts is as far.
FP8_BOUND = replace(BF16_BOUND, grads=1e-1)
# An update is the sign of a momentum, which rounding decides near zero.
LION_BOUND = replace(FP32_BOUND, weights=1e-2)
FLOOR_FACTOR = 10
# Two stock runs of few steps may agree in every loss, but no run can be closer than a rounding of
# fp32.
SMALLEST_FLOOR = 2.0**-23

# Elsewhere planners make no replica of so small a model.
REPLICAS_PAY = Path(__file__).with_name("replicas_pay.yaml")
HOMES = f"{AT_HOME} --fsep-set cluster={REPLICAS_PAY}"

# Values whose size selects no code path: more than a single digit.
_AMOUNT = re.compile(r"-?[\d.]{2,}(e-?\d+)?|-?\d+e-?\d+|-\d")


def words_of(flags: str) -> set[str]:
    """Return these flags' settings: each flag, and each with each of its values."""
    found, flag = set[str](), ""
    for word in flags.split():
        flag = word if word.startswith("--") else flag
        found.add(flag if word == flag or _AMOUNT.fullmatch(word) else f"{flag} {word}")
    return found


@dataclass(frozen=True)
class Row:
    """One combination under test.

    Attributes:
        id: in pytest's output, in `features` and in docs/support.md.
        flags: of both sides.
        fsep: flags for the FSEP side alone.
        expert_parallel: FSEP's group size N, where not all ranks.
        stock_parallel: expert-parallel sizes of the two stock runs, the reference first.
        without: switches that neither side gets.
        reference_ranks: ranks of the reference, instead of `ranks`.
        reference_flags: of the reference, instead of `flags`: the same model, cut less.
        capacity: `--fsep-capacity`, where not the default.
        steps: training steps; 0 for a run that only evaluates.
        at_night: training steps of another run at night, without figures on the page.
        evaluations: number of evaluations in the run.
        exchanges: restores and reduces of a microbatch over rank 0's MoE layers, where these are
            repeated, not all of their weights trained, or other ones restored for backward.
        adapt: changes the model on both sides.
        gradients: False if Megatron cannot return the first step's; norms are compared anyway.
        exact: True to keep FSEP's sums of tokens across ranks in fp32, as in `exact_sums`.
        by_rows_alone: True for a row that does not run with experts at home.
        releases: True to run the row with the oldest supported Megatron as well.
    """

    id: str
    flags: str
    fsep: str
    stock_parallel: tuple[int, int]
    ranks: int = 2
    experts: int = 8
    expert_parallel: int | None = None
    reference_ranks: int | None = None
    reference_flags: str | None = None
    accumulation: int = 1
    without: str = ""
    capacity: int | None = None
    steps: int = STEPS
    at_night: int | None = None
    evaluations: int = 0
    exchanges: tuple[int, int] | None = None
    adapt: Adapt | None = None
    gradients: bool = True
    exact: bool = False
    by_rows_alone: bool = False
    releases: bool = False

    @property
    def bound(self) -> Distance:
        """Return the bound of the row's precision, or of an optimizer that takes signs."""
        flags = self.flags.split()
        if "--fp8-format" in flags:
            return FP8_BOUND
        if "--bf16" in flags:
            return BF16_BOUND
        return LION_BOUND if "lion" in flags else FP32_BOUND

    @property
    def values(self) -> frozenset[str]:
        """Return the row's settings: a word for each value of each flag, and its sizes."""
        found = words_of(f"{self.flags} {self.fsep}")
        found |= {f"without {flag}" for flag in self.without.split()}
        found |= {"fused accumulation"} if UNFUSED in self.without.split() else set()
        sizes = "ranks", "experts", "expert_parallel", "accumulation", "capacity"
        found |= {f"{name} {getattr(self, name)}" for name in sizes}
        return frozenset(found | {getattr(self.adapt, "__name__", "all is trained")})

    @property
    def runs_at_home(self) -> bool:
        """Return whether the row also runs with experts at home: they need replica slots."""
        ranks, by_itself = self.expert_parallel or self.ranks, AT_HOME in self.fsep
        if by_itself or " laer" in self.fsep or self.by_rows_alone or self.experts % ranks:
            return False
        return (self.capacity or self.experts) > self.experts // ranks

    @property
    def at_home(self) -> Row:
        """Return the row with experts at home, compared with the same stock runs."""
        fsep = self.fsep + AT_HOME
        if "--fsep-planner random" not in fsep and "--fsep-set cluster" not in fsep:
            fsep += f" --fsep-set cluster={REPLICAS_PAY}"
        return replace(self, id=f"{self.id}-home", fsep=fsep)

    def reference(self, data: str) -> tuple[int, list[str]]:
        flags = self.flags if self.reference_flags is None else self.reference_flags
        command = self._command(data, self.stock_parallel[0], flags)
        return self.reference_ranks or self.ranks, command

    def other_stock(self, data: str) -> tuple[int, list[str]]:
        """Return the stock run whose distance from the reference is the floor."""
        return self.ranks, self._command(data, self.stock_parallel[1], self.flags)

    def fsep_run(self, data: str) -> tuple[int, list[str]]:
        capacity = "" if self.capacity is None else f" --fsep-capacity {self.capacity}"
        flags = self.flags + FSEP + capacity + self.fsep
        return self.ranks, self._command(data, self.expert_parallel or self.ranks, flags)

    def _command(self, data: str, expert_parallel: int, flags: str) -> list[str]:
        """Return a run's command line, with the same global batches for all runs of the row."""
        model_parallel = 1
        for size in ("tensor-model", "pipeline-model", "context"):
            model_parallel *= 2 if f"--{size}-parallel-size 2" in self.flags else 1
        return command_line(
            data,
            flags,
            experts=self.experts,
            expert_parallel=expert_parallel,
            global_batch=2 * self.accumulation * self.ranks // model_parallel,
            steps=self.steps or 1,
            without=self.without,
        )
