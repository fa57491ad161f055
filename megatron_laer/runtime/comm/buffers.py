"""Memory of exchanges: pools of their results, and workspaces to send from and receive into.

Legend: N ranks, E experts, C replica slots per rank; G ranks per node, M = N/G nodes; R rows, K
columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_laer.planner.geometry import Geometry
from megatron_laer.runtime.comm.streams import OneComputeStream

_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


class BufferPool:
    """Reused tensors, by shape and dtype.

    On CUDA a tensor may be put back while the caller's stream still uses it. Its next user submits
    work behind that stream (`streams.CommStream`), so all callers must share one, which is
    asserted.

    Attributes:
        in_use: number of tensors that were taken and not put back.
        num_bytes: size of all tensors ever made.
    """

    def __init__(self) -> None:
        self.in_use = 0
        self.num_bytes = 0
        self._free: defaultdict[_Kind, list[torch.Tensor]] = defaultdict(list)
        self._compute = OneComputeStream("a buffer pool")

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        self._compute.check(device)
        self.in_use += 1
        free = self._free[shape, dtype, device]
        if free:
            return free.pop()
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def put_back(self, tensor: torch.Tensor) -> None:
        self._compute.check(tensor.device)
        self.in_use -= 1
        self._free[tuple(tensor.shape), tensor.dtype, tensor.device].append(tensor)


class Workspace:
    """Named byte buffers that only grow, for one exchange at a time and one CUDA stream.

    Exchanges overwrite each other's data without waiting.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def buffer(self, name: str, num_bytes: int, device: torch.device) -> torch.Tensor:
        if name not in self._buffers or self._buffers[name].numel() < num_bytes:
            self._buffers.pop(name, None)  # free before the new allocation
            self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffers[name]


@dataclass(frozen=True)
class MatrixBuffers:
    """Buffers of a workspace with maximum `sizes` for one size of matrix, to be allocated once."""

    workspace: Workspace
    sizes: Mapping[str, int]
    device: torch.device

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes, most_bytes = math.prod(shape) * dtype.itemsize, self.sizes[name]
        assert num_bytes <= most_bytes, f"{name}: {num_bytes} bytes exceed the bound {most_bytes}"
        buffer = self.workspace.buffer(name, most_bytes, self.device)
        return buffer[:num_bytes].view(dtype).view(shape)


@lru_cache(maxsize=256)
def restore_workspace(
    geometry: Geometry, rows: int, columns: int, element_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer that restores of one matrix need under any layout.

    With r = ⌈R/N⌉ rows of a rank and P = min(M·r, R) rows of a local rank on all nodes together:

        send     max(min(N·C, M·E)·r if M > 1, G·C·P if G > 1)·K
        receive  max(min(E, G·C)·P if M > 1, C·R if G > 1)·K

    The stages of an exchange reuse them, so this is the peak besides the result. The geometry's
    node size is G, or N for `flat`.
    """
    nodes, slots = geometry.num_nodes, geometry.node_size * geometry.replica_slots
    block = -(-rows // geometry.num_ranks)
    local_rank_rows = min(nodes * block, rows)
    distinct = min(geometry.num_experts, slots)
    inter_node, intra_node = nodes > 1, geometry.node_size > 1
    num_sent = nodes * distinct
    row_bytes = columns * element_bytes
    return {
        "send": row_bytes
        * max(inter_node * num_sent * block, intra_node * slots * local_rank_rows),
        "receive": row_bytes
        * max(inter_node * distinct * local_rank_rows, intra_node * geometry.replica_slots * rows),
    }


@lru_cache(maxsize=256)
def reduce_workspace(
    geometry: Geometry, rows: int, columns: int, grad_bytes: int, wire_bytes: int
) -> dict[str, int]:
    """Return the bytes of each buffer that reduces of one matrix need under any layout.

    With r and P as for restores, g bytes of a gradient and w of a sum between nodes:

        send      max(C·R·g if G > 1, min(E, G·C)·P·w if M > 1)·K
        receive   max(G·C·P·g if G > 1, min(N·C, M·E)·r·w if M > 1)·K
    """
    nodes, slots = geometry.num_nodes, geometry.node_size * geometry.replica_slots
    block = -(-rows // geometry.num_ranks)
    local_rank_rows = min(nodes * block, rows)
    distinct = min(geometry.num_experts, slots)
    inter_node, intra_node = nodes > 1, geometry.node_size > 1
    num_received = nodes * distinct
    intra_sent, intra_received = geometry.replica_slots * rows, slots * local_rank_rows
    inter_sent, inter_received = distinct * local_rank_rows, num_received * block
    return {
        "send": columns
        * max(intra_node * intra_sent * grad_bytes, inter_node * inter_sent * wire_bytes),
        "receive": columns
        * max(intra_node * intra_received * grad_bytes, inter_node * inter_received * wire_bytes),
    }
