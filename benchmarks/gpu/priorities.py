"""What the priority of a stream is worth: a small copy beside a chain of large matrix products.

`python -m benchmarks.gpu.priorities`. FSEP's exchanges run at -2, compute at 0.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.gpu.report import Part, Setting, run_part
from benchmarks.gpu.timing import Times, in_turn

PRIORITIES = (0, -1, -2)
_MOST_ROUNDS = 30


def measure(setting: Setting) -> Part:
    device = setting.device
    size, links, copied = (64, 3, 2**12) if setting.dry else (8192, 12, 2**24)
    a, b = (torch.randn(size, size, device=device, dtype=setting.dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def chain() -> None:
        for _ in range(links):
            torch.mm(a, b, out=product)

    alone = in_turn({"copy": lambda: target.copy_(source), "chain": chain}, 2.0)
    copies_ms: dict[int, list[float]] = {priority: [] for priority in PRIORITIES}
    chains_ms: dict[int, list[float]] = {priority: [] for priority in PRIORITIES}
    for _ in range(3 if setting.dry else _MOST_ROUNDS):
        for priority in PRIORITIES:
            copy_ms, chain_ms = _beside(chain, lambda: target.copy_(source), priority, device)
            copies_ms[priority].append(copy_ms)
            chains_ms[priority].append(chain_ms)
        if setting.budget.spent:
            break
    found = {
        priority: (Times.of(copies_ms[priority]), Times.of(chains_ms[priority]))
        for priority in PRIORITIES
    }
    return Part({"A small copy beside a chain of large products": rows(alone, found)})


def rows(alone: dict[str, Times], found: dict[int, tuple[Times, Times]]) -> list[dict[str, Any]]:
    """Return the table of priorities; both times count from the start of the chain."""
    return [
        {
            "priority": priority,
            **copy.cells("copy done, "),
            "of the copy alone": copy.median_ms / alone["copy"].median_ms,
            **chain.cells("chain, "),
            "of the chain alone": chain.median_ms / alone["chain"].median_ms,
        }
        for priority, (copy, chain) in found.items()
    ]


def _beside(chain: Any, copy: Any, priority: int, device: torch.device) -> tuple[float, float]:
    """Return the end times of the copy and of the chain, in ms since the chain's start."""
    stream = torch.cuda.Stream(device, priority=priority)
    begin, copied, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record()
    chain()
    stream.wait_event(begin)
    with torch.cuda.stream(stream):
        copy()
        copied.record()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(copied), begin.elapsed_time(end)


if __name__ == "__main__":
    sys.exit(run_part(__doc__, measure))
