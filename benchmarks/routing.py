"""Routing for training benchmarks, by seed.

Every token draws its K experts without replacement in proportion to their popularity (Gumbel noise
on the logarithms, then the K largest). A trace has the experts of every token, so that all rivals
get the same routing, token by token.

Legend: P steps, L layers, N ranks, E experts, T tokens per rank and step, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_laer.planner.balance import max_over_mean, stock_tokens_N
from megatron_laer.tools.traces.workloads import (
    WORKLOADS,
    WorkloadShape,
    experts_of_tokens,
    workload_counts,
)

Floats = npt.NDArray[np.float64]
Trace = npt.NDArray[np.uint8]  # [P, L, N, T, K]

# Range of stock's largest rank load over the mean, as published for trained models.
LEAST_SKEW, MOST_SKEW = 1.4, 1.8
# Margin inside the range, larger than the noise of a step's draws.
_MARGIN = 0.03

# Standard deviation of the logarithm of popularity's change from step to step.
DRIFT = 0.2
BURST_EVERY = 10

# Megatron's workloads that its microbatches allow: they are equally long on every rank.
REPLAYED = tuple(name for name in WORKLOADS if name != "W4")


@dataclass(frozen=True)
class RoutingShape:
    layers: int
    ranks: int
    experts: int
    tokens: int
    topk: int


def drifting_trace(shape: RoutingShape, steps: int, seed: int) -> Trace:
    """Make a trace that is skewed differently at every step: a random walk of popularity.

    A step of the walk that would leave the skew's range is drawn again.
    """
    rng = np.random.default_rng(seed)
    walks = [_walk(shape, rng) for _ in range(shape.layers)]
    return _trace(shape, steps, rng, lambda _step, layer: next(walks[layer]))


def burst_trace(shape: RoutingShape, steps: int, seed: int) -> Trace:
    """Make an even trace whose every tenth step is skewed, each time differently."""
    rng = np.random.default_rng(seed)

    def popularity(step: int, _layer: int) -> Floats:
        return next(_walk(shape, rng)) if is_burst(step) else np.zeros(shape.experts)

    return _trace(shape, steps, rng, popularity)


def is_burst(step: int) -> bool:
    """Return True if a step of a burst trace, counted from 0, is skewed."""
    return step % BURST_EVERY == BURST_EVERY - 1


def replayed(name: str, shape: RoutingShape, steps: int) -> Trace:
    """Make the routing of a workload, the same in all layers."""
    assert shape.experts <= 256
    sizes = WorkloadShape(shape.ranks, shape.experts, shape.topk, shape.tokens)
    by_step = [
        [experts_of_tokens(counts_E, shape.topk) for counts_E in workload_counts(name, sizes, step)]
        for step in range(steps)
    ]
    found: Trace = np.repeat(np.array(by_step, dtype=np.uint8)[:, None], shape.layers, axis=1)
    return found


def fixed_bias_seed(shape: RoutingShape, std: float) -> int:
    """Return the first seed with which `--moe-router-force-biased -std` is in the skew's range.

    Megatron's flag adds normal noise per token to a normal bias per expert and layer, which
    `fixed_biases` makes from the seed.
    """
    for seed in range(10_000):
        generator = torch.Generator().manual_seed(seed)
        noise_TE = torch.randn(4096, shape.experts, generator=generator)
        skews = [
            _skew(shape, (noise_TE + bias_E).topk(shape.topk, dim=1).indices.numpy())
            for bias_E in fixed_biases(shape, std, seed)
        ]
        if all(_is_in_range(skew) for skew in skews):
            return seed
    raise ValueError(f"no seed skews all {shape.layers} layers as wanted with a bias of {std}")


def fixed_biases(shape: RoutingShape, std: float, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [std * torch.randn(shape.experts, generator=generator) for _ in range(shape.layers)]


def _walk(shape: RoutingShape, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield the logarithms of popularity, step by step, all within the skew's range."""
    log_E = np.zeros(shape.experts)
    while not _is_in_range(_skew(shape, _draw(log_E, 4096, shape.topk, rng))):
        log_E = rng.normal(scale=1.0, size=shape.experts)
    while True:
        yield log_E
        next_E = log_E + rng.normal(scale=DRIFT, size=shape.experts)
        while not _is_in_range(_skew(shape, _draw(next_E, 4096, shape.topk, rng))):
            next_E = log_E + rng.normal(scale=DRIFT, size=shape.experts)
        log_E = next_E


def _trace(
    shape: RoutingShape, steps: int, rng: np.random.Generator, log_popularity: object
) -> Trace:
    assert callable(log_popularity)
    trace = np.empty((steps, shape.layers, shape.ranks, shape.tokens, shape.topk), dtype=np.uint8)
    for step in range(steps):
        for layer in range(shape.layers):
            log_E = log_popularity(step, layer)
            drawn = _draw(log_E, shape.ranks * shape.tokens, shape.topk, rng)
            trace[step, layer] = drawn.reshape(shape.ranks, shape.tokens, shape.topk)
    return trace


def _draw(log_E: Floats, tokens: int, topk: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the experts of each token, int64 [tokens, K], the likeliest first."""
    return np.argsort(-(log_E + rng.gumbel(size=(tokens, log_E.size))), axis=1)[:, :topk]


def _skew(shape: RoutingShape, chosen_TK: npt.NDArray[np.int64]) -> float:
    """Return the largest over the mean rank load under stock placement."""
    counts_E = np.bincount(chosen_TK.ravel(), minlength=shape.experts)
    counts_NE = np.tile(counts_E, (shape.ranks, 1)).astype(np.int64)
    return max_over_mean(stock_tokens_N(counts_NE))


def _is_in_range(skew: float) -> bool:
    return LEAST_SKEW + _MARGIN <= skew <= MOST_SKEW - _MARGIN
