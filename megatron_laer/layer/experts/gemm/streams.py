"""Back end `streams`: `loop` on a few CUDA streams, so that small GEMMs run concurrently.

Legend: C slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from megatron_laer.layer.experts.gemm import SlotGemm
from megatron_laer.layer.experts.gemm.loop import Loop, spans

_STREAMS = 4  # as many as Transformer Engine's grouped GEMM has


class _Streams(Loop):
    """`SlotGemm` with the slots on several streams in turn, for which the compute stream waits."""

    def problem(
        self, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = ()
    ) -> str | None:
        if device.type == "cuda":
            return None
        return f"CUDA streams need a GPU, and this rank computes on {device}; give --fsep-gemm loop"

    def _for_each(self, tokens_C: Sequence[int], multiply: Callable[[int, slice], None]) -> None:
        compute = torch.cuda.current_stream()
        streams = _side_streams(compute.device)[: len(tokens_C)]
        ready = compute.record_event()
        for stream in streams:
            stream.wait_event(ready)
        for slot, rows in spans(tokens_C):
            with torch.cuda.stream(streams[slot % len(streams)]):
                multiply(slot, rows)
        for stream in streams:
            compute.wait_event(stream.record_event())


@functools.cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(_STREAMS))


GEMM: SlotGemm = _Streams()
