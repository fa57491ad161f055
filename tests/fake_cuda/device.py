"""The labelled device: all its parts together, and the records of a run on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from megatron_laer.runtime.comm import streams as comm_streams
from tests import entered
from tests.fake_cuda import findings, labels, names, observing, streams
from tests.fake_cuda.clocks import Checker
from tests.fake_cuda.fault import Fault
from tests.fake_cuda.findings import Finding, Findings
from tests.fake_cuda.kernels import Kernels, Launches, replaced_by_torch
from tests.fake_cuda.observing import Observer, Works
from tests.fake_cuda.oracle import Oracle
from tests.launch_order import Launch

H100, B200 = (9, 0), (10, 0)
COMPILED = "kernel compiled in a step"


@dataclass
class Watched:
    """Findings of a run on one rank, as a process sends them.

    Attributes:
        found: findings of the labelled device.
        launches: number of launches of each of Triton's kernels.
        compiled_in_steps: kernels with a variant that no launch before the first step compiled.
        entered: functions that ran, as `tests.entered` names them.
        captured: operations that a CUDA graph would record, with their places.
        held_up: launches that wait too early, if the card has one hardware queue.
        results: of the run, which are the CPU's.
        orders: launches on communicators, in their order.
        error: the error that ended the run, or "".
    """

    races: list[str]
    operations: int
    frees: int
    found: list[Finding]
    launches: dict[str, int]
    compiled_in_steps: list[str]
    entered: set[str]
    captured: set[tuple[str, str]]
    held_up: list[str]
    results: list[Any] = field(default_factory=list)
    orders: list[Launch] = field(default_factory=list)
    error: str = ""

    def report(self) -> list[str]:
        """Return a sentence about each finding, in which a deliberate fault must show."""
        return [
            *self.races,
            *self.held_up,
            *(f"{kind} in {place}: {what}" for kind, place, what in self.found),
            *(f"{COMPILED}: {name}" for name in self.compiled_in_steps),
            *(f"captured: {operation} in {place}" for operation, place in self.captured),
            *([self.error] if self.error else []),
        ]


class Observed(NamedTuple):
    """Records of a block on the labelled device."""

    checker: Checker
    findings: Findings
    launches: Launches
    entered: set[str]
    has_one_queue: bool

    def watched(self, **more: Any) -> Watched:
        checker, found, launches, functions, has_one_queue = self
        return Watched(
            *(checker.races, checker.operations, checker.frees, [*found.found]),
            *(dict(launches.number), [*+launches.compiled_in_steps], functions),
            *({*found.captured}, checker.held_up() if has_one_queue else []),
            **more,
        )


@contextlib.contextmanager
def observed(
    kernels: Kernels = replaced_by_torch,
    *,
    one_queue: bool = False,
    capability: tuple[int, int] = H100,
) -> Iterator[Observed]:
    """Let the card be labels inside the block, in this thread; yield records of its operations.

    Args:
        kernels: treatment of Triton's kernels, a function of `kernels.py`.
        one_queue: whether the card has one hardware queue, for which exchanges are launched.
        capability: of the card.
    """
    checker = Checker(findings.place)
    works, launches, found = Works(checker), Launches(), findings.renew()
    with (
        entered.recorded() as functions,
        mock.patch.object(comm_streams, "has_one_queue", lambda _: one_queue),
        observing.replaced(works),
        streams.replaced(checker),
        kernels(launches),
        names.replaced(capability),
        Oracle(Observer(checker, works)),
        _shapes_of_shards(),
        checker.grouping(),
    ):
        yield Observed(checker, found, launches, functions, one_queue)


def watch(run: Callable[[], list[Any]], fault: Fault | None, **of_card: Any) -> Watched:
    """Run on the labelled device, with a fault or none; return the findings on this rank.

    Args:
        of_card: arguments of `observed`.
    """
    results, error = list[Any](), ""
    with observed(**of_card) as device, fault.planted() if fault else contextlib.nullcontext():
        try:
            results = run()
        except Exception as raised:
            if fault is None:
                raise
            error = f"{type(raised).__name__}: {raised}"
    return device.watched(results=results, error=error)


@contextlib.contextmanager
def _shapes_of_shards() -> Iterator[None]:
    """Let DTensor work out shapes without labels, as it expects its fake tensors' own devices."""
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def without_labels(*args: Any, **kwargs: Any) -> Any:
        with labels.suspended(), _disable_current_modes():
            return propagate(*args, **kwargs)

    with mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", without_labels):
        yield
