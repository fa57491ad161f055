"""Times on a card by CUDA events, of variants in turn, until a budget is spent."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_WARM_UP = 2
_MOST_ROUNDS = 50

Run = Callable[[], object]


class Budget:
    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Return the remaining seconds; negative when the budget is spent."""
        return self._end_s - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left_s <= 0


@dataclass(frozen=True)
class Times:
    median_ms: float
    least_ms: float
    most_ms: float
    rounds: int

    @classmethod
    def of(cls, times_ms: list[float]) -> Times:
        return cls(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))

    def cells(self, prefix: str = "") -> dict[str, float]:
        return {
            f"{prefix}ms": self.median_ms,
            f"{prefix}least": self.least_ms,
            f"{prefix}most": self.most_ms,
        }


def elapsed_ms(run: Run) -> float:
    """Return the time of one call on the card, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turn(variants: Mapping[str, Run], seconds: float) -> dict[str, Times]:
    """Measure variants one after the other, round by round, so that drift affects all alike.

    After a warm-up every variant is measured at least once, even without time.
    """
    for run in variants.values():
        for _ in range(_WARM_UP):
            run()
    budget = Budget(seconds)
    times_ms: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(_MOST_ROUNDS):
        for name, run in variants.items():
            times_ms[name].append(elapsed_ms(run))
        if budget.spent:
            break
    return {name: Times.of(found) for name, found in times_ms.items()}


def copy_gb_per_s(device: torch.device, size_bytes: int, seconds: float) -> float:
    """Return the bytes read and written per second by a plain copy on the device, in GB/s."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    times = in_turn({"copy": lambda: target.copy_(source)}, seconds)["copy"]
    return 2 * size_bytes / times.median_ms / 1e6


def matmul_tflops(device: torch.device, size: int, dtype: torch.dtype, seconds: float) -> float:
    """Return the speed of a plain square matrix product on the device, in TFLOP/s."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = in_turn({"matmul": lambda: torch.mm(a, b)}, seconds)["matmul"]
    return 2 * size**3 / times.median_ms / 1e9
