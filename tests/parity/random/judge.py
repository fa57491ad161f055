"""Verdict on a random case: stock and FSEP train from equal weights, as docs/support.md states.

FSEP must be within the bound of its precision, and within ten floors. If it is not, a router's
near-tie may be the reason: then the run with stock's choices must be. With tokens by nodes or
HybridEP in bf16 there are other near-ties, such as those of a clamp. Then the run with stock's
rounding of sums must be within it. Quantisers to fp8, and Lion's signs, make a whole step of a
rounding. Then the floor is also that of stock with its own choices, from weights that are a
rounding larger or smaller. Routers' z-losses are means in the logits' dtype, so that the floor of
logged losses in bf16 is a tenth of a step at least. No bound is ever widened.

Combined 1F1B and delayed weight gradients must change no bit of FSEP's results where layouts do not
depend on prices, and stock's own change none of stock's. That is far below a floor in bf16. Stock's
reference has the plain schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from megatron_laer.cpu.ranks import Raised, RankError, RankPools
from megatron_laer.cpu.training import Record
from tests.parity.compare import Distance, distance
from tests.parity.decisions import differ
from tests.parity.random.generator import Case
from tests.parity.random.on_ranks import Outcome, train_case
from tests.parity.random.settings import IN_FP8
from tests.parity.row import FLOOR_FACTOR, SMALLEST_FLOOR

TIMEOUT_S = 600.0
_MESSAGE_CHARACTERS = 400
# Relative distance of neighbouring numbers in bf16, at most.
_BF16_STEP = 2.0**-7


class Verdict(StrEnum):
    """Verdict on a case; the last two are faults."""

    EQUAL = "equal to rounding"
    WITHIN_FLOORS = "within ten floors"
    WITHIN_BOUND = "within the bound (stock has one placement)"
    NEAR_TIES = "within, given stock's choices at near-ties"
    ROUNDING = "within, with sums rounded as stock's"
    NUDGED = "within ten floors of stock from weights a rounding off"
    UNSTEADY = "within ten floors, which for stock too is beyond the bound"
    SKIPPED = "skipped: stock refuses"
    BEYOND = "BEYOND"
    FAILED = "FAILED: stock trains, FSEP does not"

    @property
    def is_fault(self) -> bool:
        return self in (Verdict.BEYOND, Verdict.FAILED)


@dataclass(frozen=True)
class Judgement:
    """Case with its verdict, and the distances from stock by which it was found, by name."""

    case: Case
    verdict: Verdict
    distances: dict[str, Distance] = field(default_factory=dict)
    message: str = ""

    def __str__(self) -> str:
        parts = [f"{self.case.seed}: {self.verdict}", ", ".join(self.case.features)]
        parts += [f"{name} {found}" for name, found in self.distances.items()]
        parts += [self.message] if self.message else []
        if self.verdict.is_fault:
            parts.append(f"again: python -m tests.parity.random --only {self.case.seed}")
        return " | ".join(parts)


class _RunFailed(Exception):
    """Failure of a run, with its reason."""


@dataclass
class _Runs:
    case: Case
    ranks: RankPools

    def train(
        self,
        run: tuple[int, list[str]],
        given: list[Any] | None = None,
        exact: bool = False,
        nudge: float = 0.0,
    ) -> list[Outcome]:
        """Train as `train_case` does; return every rank's outcome."""
        size, command = run
        pool, case = self.ranks(size), self.case
        more = case.row.adapt, case.row.gradients, nudge
        arguments = command, case.chooses, given, exact, *more
        try:
            results = pool.run_raw(train_case, *arguments, timeout_s=TIMEOUT_S)
        except RankError as error:
            raise _RunFailed(str(error)) from None
        raised = [result for result in results if isinstance(result, Raised)]
        if raised:
            pool.close()
            # Others lose the connection to the rank that raised first.
            told = [item for item in raised if "gloo" not in item.message] or raised
            raise _RunFailed(f"{told[0].type_name}: {told[0].message}")
        return results


def judge(case: Case, ranks: RankPools, data: str) -> Judgement:
    runs = _Runs(case, ranks)
    try:
        reference = runs.train(case.row.reference(data))
    except _RunFailed as error:
        return Judgement(case, Verdict.SKIPPED, message=_one_line(error))
    try:
        return _compare(runs, reference, data)
    except _RunFailed as error:
        failed = Judgement(case, Verdict.FAILED, message=_one_line(error))
    if case.plain_schedule(data) is None:
        return failed
    try:
        runs.train(case.stock_in_schedule(data))
    except _RunFailed as error:
        return Judgement(case, Verdict.SKIPPED, message=_one_line(error))
    return failed


def _compare(runs: _Runs, reference: list[Outcome], data: str) -> Judgement:
    case, command, stock = runs.case, runs.case.row.fsep_run(data), reference[0].record
    trained = runs.train(command)[0].record
    found = distance(trained, stock)
    distances, chosen = {"FSEP": found}, None
    if (plain := case.plain_schedule(data)) is not None:
        scheduled = distance(trained, runs.train(plain)[0].record)
        distances["from its plain schedule"] = scheduled
        if case.keeps_layouts and any(scheduled.parts()):
            distances["stock from its own"] = stocks = _of_stocks_schedule(runs, data)
            if not any(stocks.parts()):
                return Judgement(case, Verdict.BEYOND, distances, "its schedule changes bits")
    judged = partial(Judgement, case, distances=distances)
    smallest = Distance(*(SMALLEST_FLOOR,) * len(found.parts()))
    if found.within(smallest.times(FLOOR_FACTOR)):
        return judged(Verdict.EQUAL)
    floor = _floor(runs, stock, data)

    def is_within(apart: Distance) -> bool:
        within_floors = floor is None or apart.within(floor.times(FLOOR_FACTOR))
        return apart.within(case.row.bound) and within_floors

    if floor is not None:
        logs_bf16 = case.has("bf16") and case.has("router in the model's dtype")
        if logs_bf16 and case.has("z loss", "all aux losses"):
            step = Distance(0.0, 0.0, 0.0, 0.0, logged=_BF16_STEP / FLOOR_FACTOR)
            floor = floor.or_larger(step)
        distances["floor"] = floor
    if is_within(found):
        return judged(Verdict.WITHIN_BOUND if floor is None else Verdict.WITHIN_FLOORS)
    if case.chooses:
        chosen = [outcome.chosen_CTK for outcome in reference]
        run = runs.train(command, chosen)
        found = distances["given stock's choices"] = distance(run[0].record, stock)
        pairs = zip((outcome.chosen_CTK for outcome in run), chosen, strict=True)
        differing = sum(int(differ(mine, theirs).sum()) for mine, theirs in pairs)
        judged = partial(judged, message=f"{differing} choices differ")
        if is_within(found):
            return judged(Verdict.NEAR_TIES)
    if case.has("bf16") and case.has("tokens by nodes", "HybridEP"):
        record = runs.train(command, exact=True)[0].record
        found = distances["with exact sums"] = distance(record, stock)
        if is_within(found):
            return judged(Verdict.ROUNDING)
    if floor is not None and case.has("fp32") and case.has("Lion", *IN_FP8):
        for nudge in (SMALLEST_FLOOR, -SMALLEST_FLOOR):
            nudged = runs.train(case.row.reference(data), chosen, nudge=nudge)
            floor = distances["floor"] = floor.or_larger(distance(nudged[0].record, stock))
        if is_within(found):
            return judged(Verdict.NUDGED)
    is_unsteady = _stock_is_beyond(case, distances["FSEP"], floor)
    return judged(Verdict.UNSTEADY if is_unsteady else Verdict.BEYOND)


def _of_stocks_schedule(runs: _Runs, data: str) -> Distance:
    """Return how far stock in the case's schedule is from itself in the plain one."""
    schedules = (runs.case.stock_in_schedule(data, plain=plain) for plain in (False, True))
    one, other = (runs.train(schedule)[0].record for schedule in schedules)
    return distance(one, other)


def _stock_is_beyond(case: Case, found: Distance, floor: Distance | None) -> bool:
    """Return True if two stock runs exceed the bound in every part in which FSEP does."""
    if floor is None or not found.within(floor.times(FLOOR_FACTOR)):
        return False
    triples = zip(found.parts(), floor.parts(), case.row.bound.parts(), strict=True)
    return all(mine <= bound or stocks > bound for mine, stocks, bound in triples)


def _floor(runs: _Runs, stock: Record, data: str) -> Distance | None:
    other = runs.case.other_stock(data)
    if other is None:
        return None
    try:
        record = runs.train(other)[0].record
    except _RunFailed:  # stock does not support this model in that size
        return None
    return distance(record, stock).at_least(SMALLEST_FLOOR)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
