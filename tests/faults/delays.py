"""Random delays wherever ranks meet or plans are made, and a record of completion orders.

Delays are drawn from (seed, rank, site, number of the call), so a seed repeats them for any timing.
A seed covers some steps of one run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from megatron_laer.cpu.training import Record, rank_of_environment, train
from tests.probes import running, watching

STEPS_PER_SEED = 2
# An order of magnitude above need, on a busy machine too.
WATCHDOG_S = 300.0

# A seed makes each site of each rank quick or slow, so that streams overtake each other both ways.
_LONGEST_MS = (0.0, 0.0, 0.5, 2.0, 10.0)
# Probability that a plan is held until its own step has begun: then it is late for any step time.
_HELD_PLANS = (0.0, 0.2, 0.8)
# A plan for a step that never comes is released after this.
_HELD_S = 5.0


class Delays:
    """Delays of one rank; without a seed there are none."""

    def __init__(self, rank: int) -> None:
        self.slept = 0
        self._rank = rank
        self._seed: int | None = None
        self._sites: dict[str, tuple[random.Random, float]] = {}
        self._step = -1
        self._stepped = threading.Condition()

    def begin_step(self, step: int) -> None:
        with self._stepped:
            self._step = step
            self._stepped.notify_all()

    def at_plan(self, source_step: int) -> None:
        """Wait, with the seed's probability, until the step after the plan's source has begun.

        That cannot block a run which waits for plans: it begins a step, and then waits.
        """
        if self._seed is None:
            return
        draws, share = self._drawn("plan", _HELD_PLANS)
        if draws.random() < share:
            self.slept += 1
            with self._stepped:
                self._stepped.wait_for(lambda: self._step > source_step, _HELD_S)
            time.sleep(draws.uniform(0.0, 0.02))

    def reseed(self, seed: int) -> None:
        self._seed = seed
        self._sites = {}

    def at(self, site: str) -> None:
        """Sleep for the seed's time; each site belongs to one thread."""
        if self._seed is None:
            return
        draws, longest_ms = self._drawn(site, _LONGEST_MS)
        delay_ms = draws.uniform(0.0, longest_ms)
        if delay_ms > 0.0:
            self.slept += 1
            time.sleep(delay_ms / 1e3)

    def _drawn(self, site: str, choices: Sequence[float]) -> tuple[random.Random, float]:
        if site not in self._sites:
            draws = random.Random(f"{self._seed} {self._rank} {site}")
            self._sites[site] = draws, draws.choice(choices)
        return self._sites[site]


@dataclass
class Trace:
    """Results of a run on one rank; the index is the step.

    `digests` are of all weights and main gradients, `completed` are exchanges in order of
    completion on streams and compute. `versions` count layout changes, `slept` are delays longer
    than zero.
    """

    record: Record
    digests: list[str] = field(default_factory=list)
    completed: list[list[str]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    slept: int = 0


def train_with_delays(flags: list[str], first_seed: int | None) -> Trace:
    """Train; step s has the delays of seed `first_seed + s // STEPS_PER_SEED`, or none. Collective.

    A seed that takes longer than WATCHDOG_S ends the rank with all stacks in its log. The pool of
    ranks then asks the others for theirs.
    """
    delays, trace = Delays(rank_of_environment()), Trace(Record())

    def begin_step(step: int) -> None:
        trace.completed.append([])
        delays.begin_step(step)
        seed, first = divmod(step, STEPS_PER_SEED)
        if first == 0:
            faulthandler.dump_traceback_later(WATCHDOG_S, exit=True, file=2)
            if first_seed is not None:
                delays.reseed(first_seed + seed)

    def after_step(model: list[torch.nn.Module]) -> None:
        trace.digests.append(digest(model))
        trace.versions.append(running().layouts.version)

    with _injected(delays, lambda name: trace.completed[-1].append(name), begin_step):
        try:
            trace.record = train(flags, after_step)
        finally:
            faulthandler.cancel_dump_traceback_later()
    trace.slept = delays.slept
    return trace


def digest(model: list[torch.nn.Module]) -> str:
    """Return a digest of every bit of this rank's weights and main gradients."""
    found = hashlib.blake2b(digest_size=16)
    for chunk in model:
        for parameter in chunk.parameters():
            for tensor in (parameter.detach(), parameter.main_grad):
                found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@contextlib.contextmanager
def _injected(
    delays: Delays, completed: Callable[[str], None], begin_step: Callable[[int], None]
) -> Iterator[None]:
    from megatron.core.tensor_parallel.mappings import _AllToAll

    from megatron_laer.planner.guard import Guard
    from megatron_laer.planner.service import PlannerService
    from megatron_laer.runtime.comm.collectives import CountsExchange, TokenSizesExchange
    from megatron_laer.runtime.comm.stages import Stage
    from megatron_laer.runtime.comm.streams import InlineStream, ThreadStream
    from megatron_laer.runtime.coordinator import Coordinator
    from megatron_laer.runtime.planning import layouts_in_force

    tokens, next_job = _AllToAll.forward, PlannerService._next_job

    def slow_tokens(ctx: Any, *args: Any) -> Any:
        # Dispatch and combine, forward and backward: Megatron's backward applies it again. Each
        # stage of an exchange through nodes has a group with its own delays.
        delays.at(f"tokens {args[0].group_name}")
        result = tokens(ctx, *args)
        completed("tokens")
        return result

    def slow_job(self: Any) -> Any:
        # Between the choice of a layer to plan and its plan, on the planner's thread.
        job = next_job(self)
        if job is not None:
            delays.at_plan(job[0])
        return job

    def slow(site: str) -> Callable[..., None]:
        return lambda *_, **__: delays.at(site)

    def slow_stage(stage: Stage, *_: Any, **__: Any) -> None:
        # The stream's thread, or the caller's without overlap; each stage is a call.
        delays.at(f"stage {stage.group.group_name}")

    def observed(submit: Callable[..., Any]) -> Callable[..., Any]:
        def observed_submit(self: Any, work: Callable[[], Any], label: Any) -> Any:
            @functools.wraps(work, assigned=(), updated=())  # the work itself stays accessible
            def job() -> Any:
                result = work()
                completed(str(label))
                return result

            return submit(self, job, label)

        return observed_submit

    with (
        mock.patch.object(_AllToAll, "forward", staticmethod(slow_tokens)),
        mock.patch.object(PlannerService, "_next_job", slow_job),
        mock.patch.object(ThreadStream, "submit", observed(ThreadStream.submit)),
        mock.patch.object(InlineStream, "submit", observed(InlineStream.submit)),
        watching(
            (Coordinator, "begin_step", lambda _, step, *__, **___: begin_step(step)),
            (Stage, "all_to_all", slow_stage),
            (Guard, "decide", slow("decision")),
            (CountsExchange, "start", slow("counts")),
            (TokenSizesExchange, "start", slow("token sizes")),
            (layouts_in_force, "broadcast_layouts", slow("layouts")),
        ),
    ):
        yield
