"""Shared experts are enqueued during the exchange of counts: counts leave, they run, counts arrive.

On CUDA the host waits where counts are read; the device computes the work enqueued before.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from megatron_laer.cpu.training import train
from tests.distributed.conftest import Trainings
from tests.parity.row import FSEP
from tests.parity.rows import FULL_RECOMPUTE, SELECTIVE, SHARED
from tests.probes import watching

OVERLAP = SHARED + " --moe-shared-expert-overlap"

LEAVE, READ, SHARE = "counts leave", "counts are read", "shared experts"
PLAIN = ["router", LEAVE, READ, "dispatch"]
COVERED = ["router", LEAVE, SHARE, READ, "dispatch"]
RERUN = ["router", SHARE, "dispatch"]

# Events of a layer in forward, and in the re-run of a checkpoint.
GRAPHED = "shared experts, graphs of routers"
CASES = {
    "no shared experts": ("", PLAIN, []),
    "shared experts": (SHARED, COVERED, []),
    "shared experts that overlap": (OVERLAP, COVERED, []),
    "recomputed with the layer": (SHARED + SELECTIVE + " moe", COVERED, RERUN),
    "recomputed alone": (SHARED + SELECTIVE + " shared_experts", COVERED, [SHARE]),
    "overlap, full recompute": (OVERLAP + FULL_RECOMPUTE, COVERED, RERUN),
    # Stock's order: a graph of the router has the shared experts too.
    GRAPHED: (SHARED, [SHARE, *PLAIN], []),
}


@contextlib.contextmanager
def noted(events: list[str]) -> Iterator[None]:
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from megatron_laer.layer.dispatch.dispatcher import SlotTokenDispatcher
    from megatron_laer.runtime.comm.collectives import CountsExchange

    def noting(event: str) -> Callable[..., None]:
        return lambda *_, **__: events.append(event)

    with watching(
        (TopKRouter, "forward", noting("router")),
        (CountsExchange, "start", noting(LEAVE)),
        (CountsExchange, "_finish", noting(READ)),
        (SharedExpertMLP, "forward", noting(SHARE)),
        (SharedExpertMLP, "pre_forward_comm", noting(SHARE)),
        (SlotTokenDispatcher, "token_dispatch", noting("dispatch")),
    ):
        yield


def observed(flags: list[str], cuda_graph_impl: str) -> list[str]:
    """Return this rank's host events of a run whose layers see that setting."""
    from megatron.core.transformer.enums import CudaGraphModule

    from megatron_laer.layer.moe_layer import FSEPMoELayer

    events: list[str] = []
    init = FSEPMoELayer.__init__

    def with_setting(layer: Any, *args: Any, **kwargs: Any) -> None:
        init(layer, *args, **kwargs)
        layer.config = copy.copy(layer.config)
        layer.config.cuda_graph_impl = cuda_graph_impl
        layer.config.cuda_graph_modules = [CudaGraphModule.moe_router]

    with noted(events), mock.patch.object(FSEPMoELayer, "__init__", with_setting):
        train(flags)
    return events


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_for_counts_once_shared_experts_are_enqueued(
    trained: Trainings, case: str
) -> None:
    flags, forward, rerun = CASES[case]
    evaluated = f"{FSEP} --eval-interval 2 --eval-iters 1{flags}"
    layers, microbatches = 2, 2 * 2  # microbatches in the two steps; each layer runs again in each
    graphs = "transformer_engine" if case == GRAPHED else "none"
    for events in trained.each(evaluated, graphs, by=observed, experts=4, steps=2):
        of_training = microbatches * layers * (len(forward) + len(rerun))
        trained, evaluated = events[:of_training], events[of_training:]
        assert evaluated == forward * (len(evaluated) // len(forward)) != []
        for number in range(microbatches):
            size = len(trained) // microbatches
            assert trained[number * size :][:size] == forward * layers + rerun * layers
