"""Deliberate faults of layers whose router and counts are in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from megatron_laer.layer.dispatch.slot_dispatch import SlotDispatching
from megatron_laer.layer.moe_layer import FSEPMoELayer
from tests.fake_cuda.fault import Fault, replaced
from tests.fake_cuda.findings import Kind

_SCENARIO = "graphs of attention, router and counts, both overlaps"
_HERE = "in tests/races/graphs.py:"
_init, _count = FSEPMoELayer.__init__, SlotDispatching.count


def _carries(*names: str) -> Callable[[], AbstractContextManager[Any]]:
    """Let these attributes alone cross the border."""

    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        _init(layer, *args, **kwargs)
        layer.token_dispatcher.cudagraph_attrs = [*names]

    return replaced(FSEPMoELayer, "__init__", init)


def _counts(
    more: Callable[[Any, torch.Tensor], object],
) -> Callable[[], AbstractContextManager[Any]]:
    def count(dispatcher: Any, routing_map_TE: torch.Tensor) -> None:
        _count(dispatcher, routing_map_TE)
        more(dispatcher, dispatcher.counts_E)

    return replaced(SlotDispatching, "count", count)


def _reads(_: Any, counts_E: torch.Tensor) -> None:
    assert counts_E.tolist()


def _gathers(dispatcher: Any, counts_E: torch.Tensor) -> None:
    gathered = counts_E.new_empty(dispatcher.ep_size * len(counts_E))
    dist.all_gather_into_tensor(gathered, counts_E, group=dispatcher.ep_group)


def _allocates(dispatcher: Any, counts_E: torch.Tensor) -> None:
    dispatcher.kept = torch.zeros_like(counts_E)


def _fault(broken: Callable[[], AbstractContextManager[Any]], found: str) -> Fault:
    return Fault(broken, found, _SCENARIO, at_night=True)


_LOST = "no counts of this pass"

GRAPH_FAULTS = {
    "a plan is made in a graph": _fault(
        replaced(FSEPMoELayer, "_count", FSEPMoELayer._count.__wrapped__),
        "a CUDA graph is being captured where a microbatch is planned",
    ),
    "counts are read in a graph": _fault(_counts(_reads), f"{Kind.UNRECORDED} {_HERE}_reads"),
    "counts are gathered in a graph": _fault(
        _counts(_gathers), "captured: c10d::_allgather_base_ in tests/launch_order.py"
    ),
    "a buffer is made in a graph": _fault(
        _counts(_allocates), f"captured: aten::zeros_like {_HERE}_allocates"
    ),
    "counts do not cross the border": _fault(_carries("routing_map_TE"), _LOST),
    "the map does not cross the border": _fault(_carries("counts_E"), _LOST),
    "what was planned crosses the border": _fault(
        _carries("tokens_per_expert", "_columns_NC", "num_out_tokens"), _LOST
    ),
}
