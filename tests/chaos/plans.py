"""Runs with their faults and times: drawn from a seed, so that a seed repeats its faults.

The moment within a step depends on the speed of the machine's ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.parity.flags import command_line
from tests.parity.row import HOMES

STEPS, SAVE_EVERY = 18, 4

_WAIT = "--expert-parallel-mode fsep --fsep-sharding rows --fsep-late-plan wait"
_ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
_LAER = "--fsep-planner laer --fsep-set cluster=cpu-gloo plan_lag=2"


@dataclass(frozen=True)
class Variant:
    name: str
    flags: str
    ranks: int = 2


VARIANTS = (
    Variant("greedy, sync", "--fsep-planner greedy"),
    Variant("greedy, async", f"--fsep-planner greedy {_ASYNC}"),
    Variant("laer lag 2, async", f"{_LAER} {_ASYNC}"),
    Variant("greedy, forecast, sync", "--fsep-planner greedy --fsep-plan-mode forecast"),
    Variant("restored per step, async", f"--fsep-planner greedy --fsep-restore step {_ASYNC}"),
    Variant("two groups, sync", "--fsep-planner greedy", ranks=4),
    Variant("experts at home, async", f"--fsep-planner greedy{HOMES} {_ASYNC}"),
    Variant("experts at home, restored per step", f"--fsep-restore step{HOMES}"),
    Variant("experts at home, two groups", f"--fsep-planner greedy{HOMES}", ranks=4),
)

KINDS = ("KILL one", "KILL all", "TERM one", "TERM all", "KILL saving")


@dataclass(frozen=True)
class Fault:
    """Fault of a job's ranks, injected once.

    `kind` names the signal, and `rank` its target if it is one rank. It comes `delay_s` after the
    end of the `step`, counted from 1; 0 is while the ranks start. All ranks of `saving` are killed
    `delay_s` after the first save from there on began. With `is_awaited`, its ranks wait after this
    step until it comes.
    """

    kind: str
    rank: int
    step: int
    delay_s: float
    is_awaited: bool = False

    def awaited_by(self, rank: int) -> int | None:
        """Return the step after which a rank waits for this fault, counted from 1, if any."""
        is_target = rank == self.rank or not self.kind.endswith("one")
        return self.step if self.is_awaited and is_target else None

    def __str__(self) -> str:
        who = f"{self.kind.split()[0]} {self.rank}" if self.kind.endswith("one") else self.kind
        moment = f"after step {self.step}" if self.step else "while starting"
        return f"{who} {moment} +{self.delay_s:.2f} s"


@dataclass(frozen=True)
class Plan:
    """One run: its kind, whether it saves at SIGTERM, its faults one after the other, its steps."""

    variant: Variant
    handles_term: bool
    faults: tuple[Fault, ...]
    steps: int = STEPS

    def flags(self, data: str, folder: str) -> list[str]:
        saved = f"{folder}/saved"
        handles = "--exit-signal-handler" if self.handles_term else ""
        return command_line(
            data,
            f"{_WAIT} {self.variant.flags} --fsep-record {folder}/recorded trace metrics layouts"
            f" --save {saved} --load {saved} --save-interval {SAVE_EVERY} {handles}",
            global_batch=4 * self.variant.ranks,
            steps=self.steps,
        )


def plans(number: int, seed: int) -> Iterator[Plan]:
    """Draw runs; half of them save at SIGTERM, and half meet their first fault before they save."""
    draws = random.Random(seed)
    for index in range(number):
        variant = VARIANTS[index % len(VARIANTS)]
        first = draws.choice((0, draws.randrange(1, SAVE_EVERY)))
        if draws.random() < 0.5:
            first = draws.randrange(SAVE_EVERY, STEPS - 1)
        steps = [first, *(draws.randrange(STEPS - 1) for _ in range(draws.randrange(3)))]
        faults = tuple(_fault(draws, variant, step) for step in steps)
        yield Plan(variant, draws.random() < 0.5, faults)


def _fault(draws: random.Random, variant: Variant, step: int) -> Fault:
    return Fault(
        draws.choice(KINDS),
        draws.randrange(variant.ranks),
        step,
        # A start takes seconds, and a step tenths of one.
        draws.uniform(0.0, 0.3 if step else 4.0),
    )
