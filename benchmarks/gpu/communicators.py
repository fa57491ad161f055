"""What NCCL takes of a card's memory for each of FSEP's communicators, at its first exchange.

Under torchrun: `-m benchmarks.gpu.communicators --data PREFIX`. Memory is the device's, so nothing
else may run on it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.recipe import fsep_group
from benchmarks.gpu.report import Part
from megatron_laer.runtime.comm.process_groups import FSEPGroups, create_groups

_NAMES = (
    *("tokens", "parameters", "gradients", "parameters_intra_node", "parameters_inter_node"),
    *("gradients_intra_node", "gradients_inter_node"),
)


def measure_memory(ranks: Ranks) -> Part:
    if not ranks.may_run():
        return Part(left_out=["communicators: the time was spent"])
    dist.init_process_group("nccl")
    world = dist.group.WORLD
    assert world is not None
    torch.cuda.set_device(ranks.rank % torch.cuda.device_count())
    groups = create_groups(world, None, fsep_group)
    taken = {name: _taken_bytes(getattr(groups, name)) for name in _made(groups)}
    gathered: list[dict[str, int]] = [{}] * ranks.size
    dist.all_gather_object(gathered, taken)
    sizes = {name: getattr(groups, name).size() for name in taken}
    groups.destroy()
    dist.destroy_process_group()
    return Part({"Memory of communicators at their first exchange": rows(gathered, sizes)})


def rows(gathered: list[dict[str, int]], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Return the table of communicators, with minimum and maximum over all ranks."""
    return [
        {
            "communicator": name,
            "ranks": size,
            "least MiB": min(taken[name] for taken in gathered) / 2**20,
            "most MiB": max(taken[name] for taken in gathered) / 2**20,
        }
        for name, size in sizes.items()
    ]


def _made(groups: FSEPGroups) -> list[str]:
    return [name for name in _NAMES if getattr(groups, name) is not None]


def _taken_bytes(group: dist.ProcessGroup) -> int:
    sent = torch.zeros(group.size() * 1024, device="cuda")
    received = torch.empty_like(sent)
    before = torch.cuda.mem_get_info()[0]
    dist.all_to_all_single(received, sent, group=group)
    torch.cuda.synchronize()
    return before - torch.cuda.mem_get_info()[0]


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, measure_memory))
