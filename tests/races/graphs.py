"""Deliberate faults of layers whose router and counts are in a CUDA graph, and runs with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching
from megatron_laer.layer.moe_layer import FSEPMoELayer
from tests.fake_cuda.findings import Kind
from tests.races.training import losses_on_cpu, watch

SCENARIO = "graphs of attention, router and counts, both overlaps"
WITH_NORMS = "experts at home, graphs of router and counts, recompute of norms"
HERE = "tests/races/graphs.py:"


class Fault(NamedTuple):
    """Replaced function, and a part of an error or a captured operation."""

    replaced: Callable[[], AbstractContextManager[Any]]
    found: str
    scenario: str = SCENARIO


_init, _count = FSEPMoELayer.__init__, SlotDispatching.count
OTHER_LOSSES = "other losses than without graphs"


def _replaced(owner: Any, name: str, replacement: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, replacement)


def _carries(*names: str) -> Callable[[], AbstractContextManager[Any]]:
    """Let these attributes alone cross the border."""

    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        _init(layer, *args, **kwargs)
        layer.token_dispatcher.cudagraph_attrs = [*names]

    return _replaced(FSEPMoELayer, "__init__", init)


def _counts(
    more: Callable[[Any, torch.Tensor], object],
) -> Callable[[], AbstractContextManager[Any]]:
    def count(dispatcher: Any, routing_map_TE: torch.Tensor) -> None:
        _count(dispatcher, routing_map_TE)
        more(dispatcher, dispatcher.counts_E)

    return _replaced(SlotDispatching, "count", count)


def _reads(_: Any, counts_E: torch.Tensor) -> None:
    assert counts_E.tolist()


def _gathers(dispatcher: Any, counts_E: torch.Tensor) -> None:
    gathered = counts_E.new_empty(dispatcher.ep_size * len(counts_E))
    dist.all_gather_into_tensor(gathered, counts_E, group=dispatcher.ep_group)


def _allocates(dispatcher: Any, counts_E: torch.Tensor) -> None:
    dispatcher.kept = torch.zeros_like(counts_E)


_MARK = "a CUDA graph is being captured where a microbatch is planned"
_LOST = "no counts of this pass"

FAULTS = {
    "a plan is made in a graph": Fault(
        _replaced(FSEPMoELayer, "_count", FSEPMoELayer._count.__wrapped__), _MARK
    ),
    "counts are read in a graph": Fault(_counts(_reads), f"{Kind.UNRECORDED} {HERE}_reads"),
    "counts are gathered in a graph": Fault(
        _counts(_gathers), "c10d::_allgather_base_ tests/launch_order.py"
    ),
    "a buffer is made in a graph": Fault(_counts(_allocates), f"aten::zeros_like {HERE}_allocates"),
    "counts do not cross the border": Fault(_carries("routing_map_TE"), _LOST),
    "the map does not cross the border": Fault(_carries("counts_E"), _LOST),
    "what was planned crosses the border": Fault(
        _carries("tokens_per_expert", "_columns_NC", "num_out_tokens"), _LOST
    ),
}


def look(data: str, name: str) -> list[str]:
    """Train with a fault; return its error, or captured operations, or that losses differ."""
    fault = FAULTS[name]
    try:
        with fault.replaced():
            if " tests/" in fault.found:  # found by the labelled device
                watched = watch(data, fault.scenario, None)
                found = [f"{finding.kind} {finding.place}" for finding in watched.found]
                return [*found, *(f"{operation} {place}" for operation, place in watched.captured)]
            losses = losses_on_cpu(data, fault.scenario)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return [OTHER_LOSSES] * (losses != losses_on_cpu(data, fault.scenario))
