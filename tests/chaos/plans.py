"""Runs with their faults and times: drawn from a seed, so that a seed repeats its faults.

The moment within a step depends on the speed of the machine's ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.parity.flags import command_line
from tests.parity.row import HOMES, REPLICAS_PAY
from tests.parity.rows import BF16, COMBINED, DIST_OPT, FP32_ROUTER, SHARED, TOKENS

STEPS, SAVE_EVERY = 18, 4
# Fewer than a record has, so that the one before it stays.
_FRAME_BYTES = 32
# A run that changes its settings ends after so many steps, and is started with the next ones.
SWITCH_EVERY = 6

_WAIT = "--expert-parallel-mode fsep --fsep-sharding rows --fsep-late-plan wait"
_ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
_LAER = "--fsep-planner laer --fsep-set cluster=cpu-gloo plan_lag=2"
_GREEDY = "--fsep-planner greedy"
_AUTO = f"{_GREEDY} --fsep-sharding auto --fsep-set cluster={REPLICAS_PAY}"
_PAIRS = f"{TOKENS.format(1)} --fsep-set pairs_interval=2 sampled_sets=16"
_SCHEDULE = f"{BF16}{COMBINED}{DIST_OPT}{SHARED}{FP32_ROUTER}"


@dataclass(frozen=True)
class Variant:
    """A kind of run: flags and number of ranks, `later` those after each SWITCH_EVERY steps.

    With `loses_state` the planner's state is lost at each switch, so that planning starts anew.
    """

    name: str
    flags: str
    ranks: int = 2
    later: tuple[tuple[str, int], ...] = ()
    loses_state: bool = False

    @property
    def lives(self) -> tuple[tuple[str, int], ...]:
        return ((self.flags, self.ranks), *self.later)

    def life(self, step: int) -> tuple[str, int]:
        """Return the flags and the number of ranks with which a start at this step trains."""
        return self.lives[min(step // SWITCH_EVERY, len(self.later))]


VARIANTS = (
    Variant("greedy, sync", _GREEDY),
    Variant("greedy, async", f"{_GREEDY} {_ASYNC}"),
    Variant("laer lag 2, async", f"{_LAER} {_ASYNC}"),
    Variant(
        "greedy, forecast lag 2, sync", f"{_GREEDY} --fsep-plan-mode forecast --fsep-set plan_lag=2"
    ),
    Variant("restored per step, async", f"{_GREEDY} --fsep-restore step {_ASYNC}"),
    Variant("two groups, sync", _GREEDY, ranks=4),
    Variant("experts at home, async", f"{_GREEDY}{HOMES} {_ASYNC}"),
    Variant("experts at home, restored per step", f"--fsep-restore step{HOMES}"),
    Variant("experts at home, two groups", f"{_GREEDY}{HOMES}", ranks=4),
    Variant("auto, pairs and sets, through nodes", f"{_AUTO}{_PAIRS}"),
    Variant("combined 1F1B, rows", f"{_GREEDY}{_SCHEDULE}"),
    Variant("combined 1F1B, experts at home, async", f"{HOMES}{_SCHEDULE} {_ASYNC}"),
    Variant("rows, auto, experts at home", _GREEDY, later=((_AUTO, 2), (HOMES, 2))),
    Variant(
        *("experts at home, rows, experts at home, async", f"{HOMES} {_ASYNC}"),
        later=((f"{_GREEDY} {_ASYNC}", 2), (f"{HOMES} {_ASYNC}", 2)),
    ),
    Variant("4, 2 and 4 ranks", _GREEDY, ranks=4, later=((_GREEDY, 2), (_GREEDY, 4))),
    Variant(
        "planner's state lost",
        f"{_GREEDY}{HOMES}",
        later=((_GREEDY + HOMES, 2),) * 2,
        loses_state=True,
    ),
)

KINDS = (
    *("KILL one", "KILL all", "KILL saving", "TERM one", "TERM all", "USR1 one", "USR1 all"),
    "STOP one",
)


@dataclass(frozen=True)
class Fault:
    """Fault of a job's ranks, injected once.

    `kind` names the signal, and `rank` its target if it is one rank. It comes `delay_s` after the
    end of the `step`, counted from 1; 0 is while the ranks start. All ranks of `saving` are killed
    `delay_s` after the first save from there on began. After STOP the rank goes on in seconds. With
    `is_awaited`, its ranks wait after this step until it comes. Before a next start, the recordings
    lose `torn_bytes` at their end, or get so many zeros if that start needs their last record.
    """

    kind: str
    rank: int
    step: int
    delay_s: float
    is_awaited: bool = False
    torn_bytes: int = 0

    def awaited_by(self, rank: int) -> int | None:
        """Return the step after which a rank waits for this fault, counted from 1, if any."""
        is_target = rank == self.rank or not self.kind.endswith("one")
        return self.step if self.is_awaited and is_target else None

    def __str__(self) -> str:
        who = f"{self.kind.split()[0]} {self.rank}" if self.kind.endswith("one") else self.kind
        moment = f"after step {self.step}" if self.step else "while starting"
        torn = f", {self.torn_bytes} B torn" if self.torn_bytes else ""
        return f"{who} {moment} +{self.delay_s:.2f} s{torn}"


@dataclass(frozen=True)
class Plan:
    """One run: its kind, the signal at which it saves or "", its faults in order, its steps."""

    variant: Variant
    saves_at: str
    faults: tuple[Fault, ...]
    steps: int = STEPS

    def recorded(self, step: int) -> str:
        """Return the folder's name for recordings, which have one sharding and size each."""
        return f"recorded-{self.variant.lives.index(self.variant.life(step))}"

    def flags(self, data: str, folder: str, step: int) -> list[str]:
        """Return the flags of a start that goes on from this step."""
        flags, _ = self.variant.life(step)
        flags += f" --save {folder}/saved --load {folder}/saved --save-interval {SAVE_EVERY}"
        flags += f" --fsep-record {folder}/{self.recorded(step)} trace metrics layouts"
        flags += f" --exit-signal-handler --exit-signal {self.saves_at}" if self.saves_at else ""
        flags += f" --exit-interval {SWITCH_EVERY}" if self.variant.later else ""
        batch = 4 * self.variant.ranks
        return command_line(data, f"{_WAIT} {flags}", global_batch=batch, steps=self.steps)


def plans(number: int, seed: int) -> Iterator[Plan]:
    """Draw runs; a third saves at no signal, and half meet their first fault before they save."""
    draws = random.Random(seed)
    for index in range(number):
        variant = VARIANTS[index % len(VARIANTS)]
        first = draws.choice((0, draws.randrange(1, SAVE_EVERY)))
        if draws.random() < 0.5:
            first = draws.randrange(SAVE_EVERY, STEPS - 1)
        steps = [first, *(draws.randrange(STEPS - 1) for _ in range(draws.randrange(3)))]
        faults = tuple(_fault(draws, variant, step) for step in steps)
        yield Plan(variant, draws.choice(("", "SIGTERM", "SIGUSR1")), faults)


def _fault(draws: random.Random, variant: Variant, step: int) -> Fault:
    return Fault(
        draws.choice(KINDS),
        draws.randrange(variant.ranks),
        step,
        # A start takes seconds, and a step tenths of one.
        draws.uniform(0.0, 0.3 if step else 4.0),
        torn_bytes=draws.choice((0, 0, draws.randrange(1, _FRAME_BYTES))),
    )
