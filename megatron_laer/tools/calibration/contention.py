"""Measurements of a GEMM and of an exchange, alone and while the other one runs.

In training, weights are exchanged during the experts' GEMMs. Both share the GPU's processors and
memory, or the CPU's cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from megatron_laer.layer.experts.gemm import slot_gemm
from megatron_laer.runtime.comm.streams import CommStream
from megatron_laer.telemetry.activities import Activity, Kind
from megatron_laer.telemetry.clock import Timestamp, make_clock
from megatron_laer.tools.calibration.gemms import product_of
from megatron_laer.tools.calibration.quantities import (
    ALONE,
    BESIDE,
    EXCHANGE,
    FORWARD,
    GEMM,
    Single,
)
from megatron_laer.tools.calibration.sampling import Job, Sample
from megatron_laer.tools.calibration.settings import CalibrationSettings

# Length of the covering work over that of the measured work.
_COVER = 3


def contention_jobs(
    stream: CommStream,
    exchanging: dist.ProcessGroup,
    control: dist.ProcessGroup,
    settings: CalibrationSettings,
    device: torch.device,
) -> Iterator[Job]:
    """Yield four jobs: GEMM and exchange, each alone and covered by the other.

    Both groups have all ranks; nothing else uses `exchanging` meanwhile.
    """
    for name in (GEMM, EXCHANGE):
        for state in (ALONE, BESIDE):

            def prepare(name: str = name, state: str = state) -> Sample:
                pair = _Pair(stream, exchanging, settings, device)
                cover = pair.cover(name, control) if state == BESIDE else 0
                return (pair.gemms if name == GEMM else pair.exchanges)(cover)

            yield Job(Single(state.format(name)), prepare, is_shared=name == EXCHANGE)


class _Pair:
    """GEMMs on the compute stream and exchanges on a communication stream."""

    def __init__(
        self,
        stream: CommStream,
        exchanging: dist.ProcessGroup,
        settings: CalibrationSettings,
        device: torch.device,
    ) -> None:
        self._clock = make_clock(device)
        self._stream = stream
        self._gemm = product_of(
            slot_gemm("loop"), FORWARD, settings.contended_tokens, settings, device
        )
        peers = dist.get_world_size() - 1
        self._sent = torch.zeros(
            (peers + 1) * (settings.contended_bytes // peers), dtype=torch.uint8, device=device
        )
        self._received = torch.empty_like(self._sent)
        self._group = exchanging

    def cover(self, covered: str, control: dist.ProcessGroup) -> int:
        """Return the number of the other's repeats that outlast one `covered`, on every rank."""
        lengths_s = []
        for sample in (self.gemms(0), self.exchanges(0)):
            sample(1)
            lengths_s.append(min(sample(1) for _ in range(3)))
        if covered == EXCHANGE:
            lengths_s.reverse()
        its_s, other_s = lengths_s
        found = torch.tensor([_COVER * its_s / other_s], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=control)
        return math.ceil(found.item())

    def gemms(self, cover: int) -> Sample:
        """Sample GEMMs, each during `cover` exchanges."""

        def sample(repeats: int) -> float:
            pending = self._stream.submit(
                partial(self._exchange, cover * repeats), Activity(Kind.EXCHANGES)
            )
            start, end = self._compute(repeats)
            pending.wait()
            self._clock.catch_up()
            return self._clock.seconds(start, end)

        return sample

    def exchanges(self, cover: int) -> Sample:
        """Sample exchanges, each during `cover` GEMMs."""

        def sample(repeats: int) -> float:
            between: list[Timestamp] = []

            def work() -> torch.Tensor:
                between.append(self._clock.now())
                received = self._exchange(repeats)
                between.append(self._clock.now())
                return received

            pending = self._stream.submit(work, Activity(Kind.EXCHANGES))
            self._compute(cover * repeats)
            pending.wait()
            self._clock.catch_up()
            return self._clock.seconds(*between)

        return sample

    def _compute(self, times: int) -> tuple[Timestamp, Timestamp]:
        start = self._clock.now()
        for _ in range(times):
            self._gemm()
        return start, self._clock.now()

    def _exchange(self, times: int) -> torch.Tensor:
        for _ in range(times):
            dist.all_to_all_single(self._received, self._sent, group=self._group)
        return self._received
