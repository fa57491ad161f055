"""The training runs of a random case, on one rank."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_laer.testing.training import Adapt, Record
from tests.parity.decisions import Chosen, Decisions, train_choosing
from tests.parity.exact_sums import train_with_exact_sums
from tests.parity.replay import train_row


@dataclass(frozen=True)
class Outcome:
    """A run on one rank.

    Attributes:
        decisions: of its routers, where they choose by themselves.
        processor_s: time of the rank's processor.
    """

    record: Record
    decisions: Decisions | None
    processor_s: float


def train_case(
    flags: list[str], adapt: Adapt | None, chooses: bool, given: list[Chosen] | None = None
) -> Outcome:
    """Train, and note what routers that choose by themselves choose. Collective.

    Args:
        given: each rank's choices of another run, which this one must follow.
    """
    begin_s = time.process_time()
    if chooses:
        record, decisions = train_choosing(flags, given, adapt)
        return Outcome(record, decisions, time.process_time() - begin_s)
    return Outcome(train_row(flags, adapt=adapt), None, time.process_time() - begin_s)


def train_case_with_exact_sums(flags: list[str], adapt: Adapt | None) -> Outcome:
    """Train with partial sums of tokens in fp32 where they cross ranks. Collective."""
    begin_s = time.process_time()
    record = train_with_exact_sums(flags, adapt)
    return Outcome(record, None, time.process_time() - begin_s)
