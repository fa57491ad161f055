"""Memory that exchanges send from and receive into: how much, and the buffers themselves.

Results are not in here: they live as long as their users want.

Legend: N ranks, E experts, C slots per rank; G ranks per span, M = N/G spans; R rows, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch

from megatron_laer.planner.geometry import Geometry


@lru_cache(maxsize=256)
def restore_workspace(
    geometry: Geometry, rows: int, columns: int, element_bytes: int
) -> dict[str, int]:
    """Bytes of each buffer that restores of one matrix need at most, whatever the layout.

    With r = ⌈R/N⌉ rows of a rank and P = M·r rows of a place:

        send     max(min(N·C, M·E)·r if M > 1, G·C·P if G > 1)·K
        receive  max(min(E, G·C)·P if M > 1, C·R if G > 1)·K

    The legs of an exchange take turns in them, so this is the peak beside the result.

    Args:
        geometry: with G as its node size; G = N for `flat`.
    """
    num_ranks, span, spans, slots = _shape(geometry)
    block = -(-rows // num_ranks)
    place = min(spans * block, rows)
    distinct = min(geometry.num_experts, slots)
    across, inside = spans > 1, span > 1
    num_sent = min(geometry.num_slots, spans * geometry.num_experts)
    return {
        "send": max(across * num_sent * block, inside * slots * place) * columns * element_bytes,
        "receive": max(across * distinct * place, inside * geometry.capacity * rows)
        * columns
        * element_bytes,
    }


@lru_cache(maxsize=256)
def reduce_workspace(
    geometry: Geometry, rows: int, columns: int, grad_bytes: int, wire_bytes: int
) -> dict[str, int]:
    """Bytes of each buffer that reduces of one matrix need at most, whatever the layout.

    With r and P as for restores, g bytes of a gradient and w of what travels between spans:

        send      max(C·R·g if G > 1, min(E, G·C)·P·w if M > 1)·K
        receive   max(G·C·P·g if G > 1, min(N·C, M·E)·r·w if M > 1)·K
        total     E·r·K·4    the float32 sums, unless the result is float32 itself
        picked    E·r·K·max(g, w)   replicas that are added next
        widened   E·r·K·4    the same in float32, unless they are
    """
    num_ranks, span, spans, slots = _shape(geometry)
    block = -(-rows // num_ranks)
    place = min(spans * block, rows)
    distinct = min(geometry.num_experts, slots)
    across, inside = spans > 1, span > 1
    num_received = min(geometry.num_slots, spans * geometry.num_experts)
    sums = geometry.num_experts * block * columns
    return {
        "send": columns
        * max(
            inside * geometry.capacity * rows * grad_bytes, across * distinct * place * wire_bytes
        ),
        "receive": columns
        * max(inside * slots * place * grad_bytes, across * num_received * block * wire_bytes),
        "total": 4 * sums,
        "picked": max(grad_bytes, across * wire_bytes) * sums,
        "widened": 4 * sums,
    }


def _shape(geometry: Geometry) -> tuple[int, int, int, int]:
    """N, G, M and the slots of a span."""
    span = geometry.node_size
    return geometry.num_ranks, span, geometry.num_nodes, span * geometry.capacity


class Workspace:
    """Named byte buffers that only ever grow, on the device of their first use.

    One exchange at a time may use it, and on CUDA always on the same stream: what one exchange left
    in a buffer is overwritten by the next without waiting.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """What is held."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        device: torch.device,
        most: Mapping[str, int],
    ) -> torch.Tensor:
        """An uninitialised contiguous tensor on buffer `name`.

        Args:
            most: bytes that each buffer will ever need for matrices of this size, so that it is
                allocated once and not again for the next layout.
        """
        num_bytes, most_bytes = math.prod(shape) * dtype.itemsize, most[name]
        assert num_bytes <= most_bytes, f"{name}: {num_bytes} bytes exceed the bound {most_bytes}"
        if name not in self._buffers or self._buffers[name].numel() < most_bytes:
            self._buffers.pop(name, None)  # before its successor is allocated
            self._buffers[name] = torch.empty(most_bytes, dtype=torch.uint8, device=device)
        return self._buffers[name][:num_bytes].view(dtype).view(shape)
