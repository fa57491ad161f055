"""One exchange, its communication streams and its buffers for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_laer.runtime.comm.buffers import BufferPool
from megatron_laer.runtime.comm.exchange import Exchange
from megatron_laer.runtime.comm.streams import CommStream


class KeptWeights:
    """Account of restored weights that stay until backward, up to `most_bytes` in all.

    The first ones of a step that fit are kept. All ranks of a group keep the same ones, since sizes
    are equal.
    """

    def __init__(self, most_bytes: float) -> None:
        self._free_bytes = most_bytes
        self._kept: dict[Any, int] = {}

    def take(self, weights: Any, num_bytes: int) -> bool:
        """Return whether these weights fit; then they are kept until `give_back`."""
        if num_bytes > self._free_bytes:
            return False
        self._kept[weights] = num_bytes
        self._free_bytes -= num_bytes
        return True

    def give_back(self, weights: Any) -> None:
        self._free_bytes += self._kept.pop(weights, 0)

    def release(self) -> None:
        """Free weights whose backward did not come."""
        for weights in [*self._kept]:
            weights.free()


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
