"""Training of the recipe with streams held up, over NCCL: no order of kernels changes a gradient.

    torchrun --nproc-per-node 2 -m tests.parity.under_delay --data PREFIX

A layer's kernels meet on several streams. If one order is missing, the result depends on which is
late. So replicas move at every microbatch, and the streams of gradients, of weights and of compute
are held up in turn. Each run is compared with one whose exchanges are waited for by the host.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.report import Part
from megatron_laer.cpu.training import Record, train
from megatron_laer.layer.moe_layer import FSEPMoELayer
from megatron_laer.runtime.comm.streams import CudaStream, Pending, Task
from megatron_laer.telemetry.activities import Activity
from tests.parity.compare import distance
from tests.parity.row import FLOOR_FACTOR, SMALLEST_FLOOR

TITLE = "Gradients with streams held up"
# Replicas in every microbatch. A step's first gradients are reduced otherwise, so the third counts.
_FLAGS = "--expert-parallel-mode fsep --fsep-sharding experts --fsep-planner random --train-iters 3"
# 50 ms at 2 GHz, the highest clock of these cards, and longer at a lower one.
_DELAY_CYCLES = 100_000_000


@contextlib.contextmanager
def _in_order() -> Iterator[None]:
    """Let the host wait for the device before and after each exchange."""
    submit = CudaStream.submit

    def waited(stream: CudaStream, work: Task, activity: Activity) -> Pending:
        torch.cuda.synchronize()
        pending = submit(stream, work, activity)
        torch.cuda.synchronize()
        return pending

    with mock.patch.object(CudaStream, "submit", waited):
        yield


@contextlib.contextmanager
def _late(name: str, hold_up: Callable[[], None]) -> Iterator[None]:
    """Hold up each exchange of a communication stream."""
    submit = CudaStream.submit

    def late(stream: CudaStream, work: Task, activity: Activity) -> Pending:
        def held_up() -> torch.Tensor:
            hold_up()
            return work()

        return submit(stream, held_up if stream.times.name == name else work, activity)

    with mock.patch.object(CudaStream, "submit", late):
        yield


@contextlib.contextmanager
def _late_compute(hold_up: Callable[[], None]) -> Iterator[None]:
    """Hold up the compute stream before each dispatch."""
    preprocess = FSEPMoELayer.preprocess

    def late(layer: Any, *args: Any, **kwargs: Any) -> Any:
        hold_up()
        return preprocess(layer, *args, **kwargs)

    with mock.patch.object(FSEPMoELayer, "preprocess", late):
        yield


def _sleep(*, dry: bool) -> Callable[[], None]:
    return lambda: None if dry else torch.cuda._sleep(_DELAY_CYCLES)


def measure(ranks: Ranks) -> Part:
    """Compare runs with one stream held up, and one without, to a run in order."""
    part = ranks.part()
    size = replace(ranks.model, experts=ranks.model.experts * ranks.size)
    flags = [*ranks.flags(size, ranks.size), *_FLAGS.split()]
    hold_up = _sleep(dry=ranks.dry)
    runs = {
        "none": contextlib.nullcontext(),
        "gradients": _late("gradients", hold_up),
        "weights": _late("parameters", hold_up),
        "compute": _late_compute(hold_up),
    }

    def run(held_up: contextlib.AbstractContextManager[None]) -> Record | None:
        if not ranks.may_run():
            return None
        with held_up:
            # Whole gradients of a step would be reduced in another way than in training.
            return train(flags, gradients=False)

    reference, again = run(_in_order()), run(_in_order())
    found = {name: run(held_up) for name, held_up in runs.items()}
    if reference is None or again is None:
        part.left_out.append("gradients with streams held up: the time was spent")
        return part
    part.left_out += [f"{name} held up: the time was spent" for name in found if not found[name]]
    if ranks.rank == 0:
        floor = distance(again, reference).at_least(SMALLEST_FLOOR)
        rows = {name: distance(each, reference) for name, each in found.items() if each}
        part.tables[TITLE] = [
            {"held up": name, "from the run in order": str(of), "of two in order": str(floor)}
            for name, of in rows.items()
        ]
        part.problems += [
            f"{name} held up: gradients differ from those in order"
            for name, of in rows.items()
            if not of.within(floor.times(FLOOR_FACTOR))
        ]
    return part


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, measure))
