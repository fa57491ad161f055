"""Samples of each figure, taken on all ranks in step and gathered on rank 0."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from megatron_laer.planner.clusters import Figure
from megatron_laer.tools.calibration.fitting import figure_of
from megatron_laer.tools.calibration.quantities import Quantity
from megatron_laer.tools.calibration.settings import CalibrationSettings

# Maximum samples per figure, round and rank; more do not narrow the estimate.
_MOST_SAMPLES = 200

# Returns the seconds of a number of repeats.
Sample = Callable[[int], float]


@dataclass(frozen=True)
class Job:
    """Measurement of one figure, which is of one of the `units` in a repeat.

    In `is_shared` jobs all ranks take part in a repeat, so the slowest one's time counts.
    """

    quantity: Quantity
    prepare: Callable[[], Sample]
    units: int = 1
    is_shared: bool = False


def timed(
    run: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Sample:
    """Return a sample of a function, with a synchronization of the device at the end."""

    def sample(repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    return sample


def measure(
    jobs: Iterable[Job], settings: CalibrationSettings, control: dist.ProcessGroup
) -> dict[Quantity, Figure]:
    """Return the figures on rank 0, none on others. Collective over all ranks.

    `jobs` are the same on all ranks. Those of one figure may repeat, with others between: a
    disturbance of seconds then touches few of its samples. Nothing is measured on `control`, a gloo
    group.
    """
    mine: dict[Quantity, list[float]] = {}
    shared = set()
    for job in jobs:
        mine.setdefault(job.quantity, []).extend(_samples(job, settings, control))
        if job.is_shared:
            shared.add(job.quantity)
    of_ranks: list[dict[Quantity, list[float]]] = [{} for _ in range(dist.get_world_size())]
    is_first = dist.get_rank() == 0
    dist.gather_object(mine, of_ranks if is_first else None, dst=0, group=control)
    if not is_first:
        return {}
    figures = {}
    for quantity in mine:
        by_rank = [samples[quantity] for samples in of_ranks]
        if quantity in shared:
            figures[quantity] = figure_of(map(max, zip(*by_rank, strict=True)))
        else:
            figures[quantity] = figure_of(chain.from_iterable(by_rank))
    return figures


def _samples(job: Job, settings: CalibrationSettings, control: dist.ProcessGroup) -> list[float]:
    sample = job.prepare()
    sample(1)
    # The first calls may be slow, so the shorter of two sets the number of repeats.
    estimate_s = _slowest(min(sample(1), sample(1)), control)
    repeats = max(1, math.ceil(settings.sample_s / estimate_s))
    wanted = int(settings.round_s / (repeats * estimate_s))
    count = min(max(wanted, settings.least_samples), _MOST_SAMPLES)
    samples = []
    for _ in range(count):
        dist.barrier(group=control)
        samples.append(sample(repeats) / (repeats * job.units))
    return samples


def _slowest(seconds: float, control: dist.ProcessGroup) -> float:
    found = torch.tensor([max(seconds, 1e-9)], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=control)
    return float(found.item())
