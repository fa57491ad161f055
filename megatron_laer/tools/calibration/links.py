"""Measurements of exchanges, by class of links, number of peers and size.

As in training, all groups of one kind exchange at the same time. Groups between nodes have ranks
with the same local rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_laer.tools.calibration.quantities import INTER, INTRA, AllToAll
from megatron_laer.tools.calibration.sampling import Job, Sample, timed
from megatron_laer.tools.calibration.settings import CalibrationSettings


@dataclass(frozen=True)
class Partners:
    """Group in which this rank exchanges over one class of links."""

    link: str
    peers: int
    group: dist.ProcessGroup


def partner_ranks(world_size: int, node_size: int) -> list[tuple[str, list[list[int]]]]:
    """Return the disjoint groups of each class of links and size.

    Sizes are powers of 2 that divide a node, or the number of nodes, and the whole.
    """
    num_nodes = world_size // node_size
    found = []
    for size in _sizes(node_size):
        starts = range(0, world_size, size)
        found.append((INTRA, [list(range(start, start + size)) for start in starts]))
    for size in _sizes(num_nodes):
        groups = [
            [node * node_size + local_rank for node in range(first, first + size)]
            for first in range(0, num_nodes, size)
            for local_rank in range(node_size)
        ]
        found.append((INTER, groups))
    return found


def _sizes(whole: int) -> list[int]:
    powers = [2**power for power in range(1, whole.bit_length())]
    return sorted({size for size in (*powers, whole) if size > 1 and whole % size == 0})


def make_partners(settings: CalibrationSettings, backend: str) -> list[Partners]:
    """Create all groups and return this rank's. Collective over all ranks."""
    mine = []
    for link, groups in partner_ranks(dist.get_world_size(), settings.node_size):
        for ranks in groups:
            group = dist.new_group(ranks, backend=backend)
            if dist.get_rank() in ranks:
                assert isinstance(group, dist.ProcessGroup)
                mine.append(Partners(link, len(ranks) - 1, group))
    return mine


def exchange_jobs(
    partners: list[Partners], settings: CalibrationSettings, device: torch.device
) -> Iterator[Job]:
    for of in partners:
        for wanted_bytes in settings.sent_bytes:
            peer_bytes = max(1, wanted_bytes // of.peers)

            def prepare(of: Partners = of, peer_bytes: int = peer_bytes) -> Sample:
                sent = torch.zeros((of.peers + 1) * peer_bytes, dtype=torch.uint8, device=device)
                received = torch.empty_like(sent)
                return timed(lambda: dist.all_to_all_single(received, sent, group=of.group), device)

            quantity = AllToAll(of.link, of.peers, of.peers * peer_bytes)
            yield Job(quantity, prepare, is_shared=True)
