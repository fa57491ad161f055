"""Trainings whose last step is recorded, for times on cards with one hardware queue or many.

The models are Mixtral 8x7B's layers, smaller by the same factor in each dimension: hidden size and
experts, tokens of a sequence, vocabulary. Two ranks of three slots receive as much in a restore as
32 ranks of two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from tests.fake_cuda.kernels import Launches, interpreted, replaced_by_torch
from tests.fake_cuda.recorder import Recorder, Recording
from tests.parity.flags import command_line
from tests.parity.replay import train_row
from tests.races.training import megatron_observed

SCALE = 64
_MIXTRAL = (
    "--expert-parallel-mode fsep --fsep-sharding rows --fsep-planner random --fsep-capacity 3 "
    f"--hidden-size {4096 // SCALE} --moe-ffn-hidden-size {14336 // SCALE} "
    f"--seq-length {4096 // SCALE} --max-position-embeddings {4096 // SCALE} "
    "--micro-batch-size 2 --bf16 --fsep-set gemm=loop"
)


class Case(NamedTuple):
    """Flags of a training, its ranks and the samples of a step, two in each microbatch.

    Attributes:
        node_size: ranks of a node, where there are several nodes.
    """

    flags: str
    ranks: int
    batch: int
    node_size: int = 1


CASES = {
    "one layer": Case("--num-layers 1", 2, 8),
    "four layers": Case("--num-layers 4", 2, 8),
    "pipeline of two stages": Case("--num-layers 4 --pipeline-model-parallel-size 2", 4, 8),
    "four layers, node by node": Case(
        "--num-layers 4 --expert-model-parallel-size 4 --fsep-node-size 2 "
        "--fsep-set restore_algorithm=node",
        *(4, 16, 2),
    ),
}


def record(data: str, case: str, one_queue: bool) -> Recording:
    """Train two steps; return what this rank launched in the second."""
    flags = f"{_MIXTRAL} {CASES[case].flags}"
    command = command_line(data, flags, experts=4, global_batch=CASES[case].batch, steps=2)
    recorders: list[Recorder] = []

    def make(*args: Any) -> Recorder:
        recorders.append(Recorder(*args))
        return recorders[-1]

    with megatron_observed(interpreted, one_queue=one_queue, make_checker=make):
        (recorder,) = recorders
        with recorder.grouping(), _last_step_recorded(recorder):
            train_row(command)
    return recorder.recording


@contextlib.contextmanager
def _last_step_recorded(recorder: Recorder) -> Iterator[None]:
    from megatron.training import get_args, training

    true_step = training.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        if get_args().curr_iteration + 1 < get_args().train_iters:
            # Interpreting kernels would take most of the time, and nothing is recorded yet.
            with replaced_by_torch(Launches()):
                return true_step(*args, **kwargs)
        recorder.start()
        result = true_step(*args, **kwargs)
        recorder.stop()
        return result

    with mock.patch.object(training, "train_step", step):
        yield
