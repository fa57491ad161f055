"""The training runs of a random case, on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from megatron_laer.cpu import weights
from megatron_laer.cpu.training import Adapt, Record
from tests.parity.decisions import Chosen, choices
from tests.parity.exact_sums import exact_sums
from tests.parity.replay import train_row


@dataclass(frozen=True)
class Outcome:
    record: Record
    chosen_CTK: Chosen | None


def train_case(
    flags: list[str],
    chooses: bool = True,
    given: list[Chosen] | None = None,
    exact: bool = False,
    adapt: Adapt | None = None,
    gradients: bool = True,
    nudge: float = 0.0,
) -> Outcome:
    """Train, and note the choices of routers, if these choose by themselves. Collective.

    `given` are each rank's choices to follow; `exact` keeps partial sums of tokens across ranks in
    fp32; `nudge` is the relative change of all weights at the start.
    """
    nothing = contextlib.nullcontext()
    with (
        exact_sums() if exact else nothing,
        _nudged(nudge) if nudge else nothing,
        choices(given) if chooses else nothing as observed,
    ):
        record = train_row(flags, None, adapt, gradients)
    return Outcome(record, None if observed is None else observed.chosen_CTK)


@contextlib.contextmanager
def _nudged(change: float) -> Iterator[None]:
    load = weights.load_common_weights

    def loaded(model: list[Any]) -> None:
        load(model)
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.data.mul_(1 + change)

    with mock.patch.object(weights, "load_common_weights", loaded):
        yield
