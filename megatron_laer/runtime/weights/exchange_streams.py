"""One exchange, its communication streams and its buffers for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.streams import CommStream
from megatron_laer.runtime.weights.kept_weights import KeptWeights


@dataclass(frozen=True)
class ExchangeStreams:
    """Exchange, its communication streams, its result buffers, and the weights kept in them."""

    exchange: Exchange
    parameters: CommStream
    gradients: CommStream
    weights: BufferPool = field(default_factory=BufferPool)
    grads: BufferPool = field(default_factory=BufferPool)
    kept: KeptWeights = field(default_factory=lambda: KeptWeights(0))

    def close(self) -> None:
        self.parameters.close()
        self.gradients.close()
