"""Megatron's own loop, which trains a small model on replaced streams, watched by the checker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from megatron_laer.cpu import training
from tests.parity.flags import command_line
from tests.parity.replay import REPLAY, train_row
from tests.races.clocks import Watched
from tests.races.cuda import current_stream
from tests.races.faults import TRAINING_FAULTS
from tests.races.observing import accumulate_on, observed

_RANDOM = " --fsep-planner random"
_HOME = _RANDOM + " --fsep-sharding experts"
_OVERLAPS = " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
_FULL = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_VIRTUAL = (
    " --pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
)
_MOE = " --recompute-granularity selective --recompute-modules moe"


class Training(NamedTuple):
    """Scenario: flags of a training run, and its number of ranks, in groups of two."""

    flags: str
    ranks: int = 2


SCENARIOS = {
    "plain": Training(""),
    "random layouts": Training(_RANDOM),
    "fresh layouts after the gate": Training(" --fsep-plan-mode exact"),
    "announced layouts": Training(f" --fsep-plan-mode announced {REPLAY}"),
    "full recompute": Training(_RANDOM + _FULL),
    "recompute of the MoE layer": Training(_RANDOM + _MOE),
    "experts held over a step": Training(_RANDOM + " --fsep-restore step"),
    "both overlaps": Training(_RANDOM + _OVERLAPS),
    "tokens through nodes of 1, recompute of the MoE layer": Training(
        _RANDOM + _MOE + " --fsep-node-size 1 --fsep-token-exchange node"
    ),
    "tokens through nodes of 2": Training(
        _RANDOM + " --expert-model-parallel-size 4 --fsep-node-size 2 --fsep-token-exchange node", 4
    ),
    "virtual pipeline 2 x 2": Training(_RANDOM + _VIRTUAL, 4),
    "both overlaps, slices replicated": Training(_RANDOM + _OVERLAPS, 4),
    "experts at home, both overlaps": Training(_HOME + _OVERLAPS),
    "experts at home by relay, recompute of the MoE layer": Training(
        _HOME + _MOE + " --fsep-node-size 1 --fsep-restore-algorithm node"
    ),
    "experts at home, full recompute, both overlaps": Training(_HOME + _FULL + _OVERLAPS),
    "experts at home held over a step, both overlaps": Training(
        _HOME + _OVERLAPS + " --fsep-restore step"
    ),
}


def watch(data: str, scenario: str, fault: str | None) -> Watched:
    """Train a scenario, with a fault or none; return the checker's findings on this rank."""
    flags = "--expert-parallel-mode fsep --fsep-sharding rows" + SCENARIOS[scenario].flags
    command = command_line(data, flags, experts=4, global_batch=8, steps=3)
    broken = contextlib.nullcontext() if fault is None else TRAINING_FAULTS[fault].replaced()
    whole = mock.patch.object(training, "fresh_megatron", _synchronised)
    with _fresh_streams(), observed() as checker, _side_stream_of_leaves(), whole, broken:
        train_row(command)
    return Watched(checker.races, checker.operations, checker.frees)


@contextlib.contextmanager
def _synchronised(model: list[torch.nn.Module]) -> Iterator[None]:
    """Wait for the device before a run's memory is freed, as the end of a process does."""
    with _fresh_megatron(model):
        try:
            yield
        finally:
            torch.cuda.synchronize()


_fresh_megatron = training.fresh_megatron


@contextlib.contextmanager
def _side_stream_of_leaves() -> Iterator[None]:
    """Accumulate gradients on the stream that Megatron builds DDP on, as autograd does on CUDA."""
    from megatron.core.distributed import DistributedDataParallel

    true_init = DistributedDataParallel.__init__

    def init(ddp: Any, *args: Any, **kwargs: Any) -> None:
        true_init(ddp, *args, **kwargs)
        for node in ddp.grad_accs:
            accumulate_on(current_stream(), node)

    with mock.patch.object(DistributedDataParallel, "__init__", init):
        yield


@contextlib.contextmanager
def _fresh_streams() -> Iterator[None]:
    """Let Megatron make the stream that its class keeps anew, inside and after the block."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    with mock.patch.object(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None):
        yield
