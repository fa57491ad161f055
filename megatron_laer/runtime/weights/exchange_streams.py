"""One exchange, its communication streams and its buffers for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.streams import CommStream


@dataclass(frozen=True)
class ExchangeStreams:
    """Exchange, its communication streams, its result buffers, and the weights kept in them.

    Attributes:
        most_kept_bytes: of weights that stay until backward, the first ones of a step that fit. All
            ranks of a group keep the same ones, since sizes are equal.
        kept: those weights, `RestoredWeights`, and their bytes.
    """

    exchange: Exchange
    parameters: CommStream
    gradients: CommStream
    most_kept_bytes: float = 0
    weights: BufferPool = field(default_factory=BufferPool)
    grads: BufferPool = field(default_factory=BufferPool)
    kept: dict[Any, int] = field(default_factory=dict)

    def close(self) -> None:
        self.parameters.close()
        self.gradients.close()
