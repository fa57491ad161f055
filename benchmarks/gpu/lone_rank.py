"""Replacement for rank 0 of N: collectives copy the sent data to the receive buffers.

Every other rank is assumed to send the same as this one. So counts, plans and the sizes of all
buffers are those of N ranks. Received values are finite and meaningless, and a copy on the card
replaces the wire.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Done:
    """Work of a collective that is already in its stream."""

    def wait(self, *_: Any) -> bool:
        """Return at once: the stream orders later work."""
        return True

    def is_completed(self) -> bool:
        return True


def install(ranks: int) -> None:
    """Make this process rank 0 of N. Call it before importing Megatron, which binds collectives."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for function in (all_gather_into_tensor, all_to_all_single, all_gather_object):
        setattr(dist, function.__name__, function)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def all_gather_into_tensor(
    output: torch.Tensor, given: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Done:
    _fill(output, given)
    return _Done()


def all_to_all_single(output: torch.Tensor, given: torch.Tensor, *_: Any, **__: Any) -> _Done:
    """Receive this rank's sent data, repeated or cut to the output's size."""
    _fill(output, given)
    return _Done()


def all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
    objects[:] = [mine] * len(objects)


@torch.no_grad()
def _fill(output: torch.Tensor, given: torch.Tensor) -> None:
    target, source = output.view(-1), given.reshape(-1)
    if not len(source):
        target.zero_()
        return
    for begin in range(0, len(target), len(source)):
        part = target[begin : begin + len(source)]
        part.copy_(source[: len(part)])
