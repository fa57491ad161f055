"""Bytes of a rank's weights, gradients and optimizer state, by the sharding of dense layers.

Experts are at home, so that Megatron-FSDP shards their optimizer state alone. Adam has a main
weight in fp32 and two moments. Padding of buckets and layers in use are not included.
"""

from __future__ import annotations

from typing import NamedTuple

# Bytes per weight: of the main gradient in fp32, and of the main weight with two moments.
GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 12


class RankWeights(NamedTuple):
    """Numbers of weights that a rank would have without sharding.

    Attributes:
        layers: dense weights of transformer layers, a tensor rank's share.
        others: weights outside of layers: embedding, output layer and last norm.
        experts: of home experts.
    """

    layers: float
    others: float
    experts: float

    @property
    def dense(self) -> float:
        return self.layers + self.others


class StateBytes(NamedTuple):
    """Bytes of a rank that stay from step to step."""

    weights: float
    gradients: float
    optimizer: float


def state_bytes(
    of: RankWeights,
    strategy: str | None,
    *,
    ranks: int,
    expert_ranks: int,
    bytes_per_weight: int,
    bytes_per_gradient: int = GRADIENT_BYTES,
    frozen: float = 0,
) -> StateBytes:
    """Return a rank's bytes with the distributed optimizer, or one of Megatron-FSDP's strategies.

    Args:
        strategy: "optim", "optim_grads" or "optim_grads_params"; None without Megatron-FSDP.
        ranks: data-parallel ranks, with context-parallel ones, that share the dense part.
        expert_ranks: expert-data-parallel ranks, which have the same home experts.
        bytes_per_gradient: with Megatron-FSDP by default those of a weight.
        frozen: weights without gradients, such as those that LoRA adapts; whole on each rank.
    """
    shards_gradients = strategy in ("optim_grads", "optim_grads_params")
    weights, gradients = of.dense, of.dense / (ranks if shards_gradients else 1)
    if strategy == "optim_grads_params":
        # Outside of layers, whole weights stay next to their shards.
        weights = of.dense / ranks + of.others
    return StateBytes(
        (weights + of.experts + frozen) * bytes_per_weight,
        (gradients + of.experts) * bytes_per_gradient,
        (of.dense / ranks + of.experts / expert_ranks) * OPTIMIZER_BYTES,
    )
