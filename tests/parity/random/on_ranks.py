"""The training runs of a random case, on one rank."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from megatron_laer.cpu.training import Adapt, Record
from tests.parity.decisions import Chosen, Decisions, train_choosing
from tests.parity.exact_sums import exact_sums
from tests.parity.replay import train_row


@dataclass(frozen=True)
class Outcome:
    record: Record
    decisions: Decisions | None
    processor_s: float


def train_case(
    flags: list[str],
    chooses: bool = True,
    given: list[Chosen] | None = None,
    exact: bool = False,
    adapt: Adapt | None = None,
    gradients: bool = True,
) -> Outcome:
    """Train, and note the choices of routers, if these choose by themselves. Collective.

    `given` are each rank's choices to follow; `exact` keeps partial sums of tokens across ranks in
    fp32.
    """
    begin_s = time.process_time()
    decisions = None
    with exact_sums() if exact else contextlib.nullcontext():
        if chooses:
            record, decisions = train_choosing(flags, given, adapt, gradients)
        else:
            record = train_row(flags, None, adapt, gradients)
    return Outcome(record, decisions, time.process_time() - begin_s)
