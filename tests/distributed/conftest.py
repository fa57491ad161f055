"""Trainings of the test model on ranks, with which most tests of this folder begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_laer.cpu.ranks import Raised, RankPool, RankPools
from megatron_laer.cpu.training import train
from tests.parity.flags import command_line
from tests.parity.replay import train_row


@dataclass(frozen=True)
class Trainings:
    """Trains by `by(flags, *more)` on `size` ranks; `model` has options of `command_line`."""

    ranks: RankPools
    data: str

    def flags(
        self, extra: str = "", *, steps: int = 3, global_batch: int = 8, **model: Any
    ) -> list[str]:
        return command_line(self.data, extra, steps=steps, global_batch=global_batch, **model)

    def each(
        self,
        extra: str,
        *more: Any,
        by: Callable[..., Any] = train,
        size: int = 2,
        timeout_s: float = 1200.0,
        run: Callable[..., list[Any]] = RankPool.run,
        **model: Any,
    ) -> list[Any]:
        """Return every rank's result."""
        flags = self.flags(extra, **model)
        return run(self.ranks(size), by, flags, *more, timeout_s=timeout_s)

    def __call__(self, extra: str = "", *more: Any, **options: Any) -> Any:
        """Return rank 0's result; options are those of `each`."""
        return self.each(extra, *more, **options)[0]

    def ends(self, extra: str, *more: Any, **options: Any) -> list[Any]:
        """Return every rank's result, or its `Raised`; options are those of `each`."""
        return self.each(extra, *more, run=RankPool.run_raw, **options)

    def refused(self, extra: str, *more: Any, kind: str = "RefusedError", **options: Any) -> str:
        """Return the one message with which every rank refuses; options are those of `each`."""
        return refusal(self.ends(extra, *more, **options), kind)


def train_grouped(flags: list[str], *more: Any, by: Callable[..., Any] = train_row) -> Any:
    """Train with Megatron's grouped experts."""
    from tests.grouped_experts import grouped

    with grouped():
        return by(flags, *more)


# A step of a model whose experts have biases.
BIASED: dict[str, Any] = {"without": "--disable-bias-linear", "steps": 1}


def refusal(results: list[Any], kind: str = "RefusedError") -> str:
    """Return the one message of the errors of all ranks, which are of this kind."""
    assert all(isinstance(result, Raised) for result in results), results
    assert {result.type_name for result in results} == {kind}, results[0].traceback
    (message,) = {result.message for result in results}
    return str(message)


@pytest.fixture(scope="session")
def trained(ranks: RankPools, text_data: str) -> Trainings:
    """Return `trained(flags)`, the record of a training on two ranks."""
    return Trainings(ranks, text_data)
