"""All layers of a rank share one exchange, its two communication streams, and buffer pools."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.exchange import HierarchicalExchange
from megatron_laer.runtime.comm.streams import CommStream


@dataclass(frozen=True)
class ExchangeStreams:
    """Holds the exchange, the communication streams it runs on, and the memory it fills.

    Attributes:
        parameters: the communication stream of restores.
        gradients: the communication stream of reduces.
        weights: restored matrices; as many as the schedule restores layers at once.
        grads: gradients of restored matrices, likewise.
    """

    exchange: HierarchicalExchange
    parameters: CommStream
    gradients: CommStream
    weights: BufferPool = field(default_factory=BufferPool)
    grads: BufferPool = field(default_factory=BufferPool)

    def close(self) -> None:
        """End both communication streams."""
        self.parameters.close()
        self.gradients.close()
