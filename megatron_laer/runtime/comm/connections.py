"""Connections of NCCL's communicators, made before the first step.

NCCL makes a communicator at its first collective, and connects two ranks at their first message.
Layouts exchange with few peers, so both would go on for thousands of steps. Each is a handshake
that all ranks wait for, and takes memory that torch's allocator may hold by then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_laer.runtime.comm.process_groups import Group

logger = logging.getLogger(__name__)


def connect(communicators: Iterable[Group], device: torch.device) -> None:
    """Connect all pairs of ranks of each communicator by one small All-to-All.

    Collective over each, in this order on all of its ranks. On CUDA, the first rank of the first
    one logs the device's free memory before and after.
    """
    groups = [*dict.fromkeys(communicators)]
    before_bytes = _free_bytes(device)
    for group in groups:
        sent = torch.zeros(group.size(), device=device)
        dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
    if groups and device.type == "cuda" and dist.get_rank(groups[0]) == 0:
        free_gib = (bytes / 2**30 for bytes in (before_bytes, _free_bytes(device)))
        logger.info(
            "FSEP: %d communicators are connected; free memory of this device before and after:"
            " %.2f and %.2f GiB",
            len(groups),
            *free_gib,
        )


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
