"""These generators make the workloads of Megatron's benchmark proposal (its pull request 7488).

Each is a sequence of microbatches of counts, so that a layout made for one can be judged on the
next. Names are theirs; the numbers are ours, fixed here. Only counts: no tokens, no model.

Legend: N ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.planner.geometry import Geometry

_TOKENS = 4096  # per rank and microbatch, counted once per selected expert


def microbatches(name: str, geometry: Geometry, count: int, seed: int) -> Iterator[Int64]:
    """`count` successive counts_NE, int64 [N, E], of a workload.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; use one of {', '.join(WORKLOADS)}")
    rng = np.random.default_rng(seed)
    order_E = rng.permutation(geometry.num_experts)
    for step in range(count):
        yield WORKLOADS[name](geometry, order_E, step, rng)


def _draw(share_NE: np.ndarray, tokens_N: Int64, rng: np.random.Generator) -> Int64:
    rows = [
        rng.multinomial(tokens, share_E / share_E.sum())
        for tokens, share_E in zip(tokens_N, share_NE, strict=True)
    ]
    return np.array(rows, dtype=np.int64)


def _flat(geometry: Geometry) -> np.ndarray:
    return np.ones((geometry.num_ranks, geometry.num_experts))


def _all_tokens(geometry: Geometry) -> Int64:
    return np.full(geometry.num_ranks, _TOKENS)


def _drift(share_NE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return share_NE * rng.uniform(0.9, 1.1, share_NE.shape[1])


def _balanced(shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator) -> Int64:
    return _draw(_flat(shape), _all_tokens(shape), rng)


def _hot_expert_set(shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator) -> Int64:
    share_NE = _flat(shape)
    hot = max(1, shape.num_experts // 8)
    share_NE[:, order_E[:hot]] *= 16
    return _draw(_drift(share_NE, rng), _all_tokens(shape), rng)


def _hot_rank(shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator) -> Int64:
    # The experts that stock placement puts on the first rank.
    share_NE = _flat(shape)
    share_NE[:, : max(1, shape.num_experts // shape.num_ranks)] *= 16
    return _draw(_drift(share_NE, rng), _all_tokens(shape), rng)


def _spread_hot_experts(
    shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator
) -> Int64:
    share_NE = _flat(shape)
    share_NE[:, :: max(1, shape.num_experts // 4)] *= 12
    return _draw(_drift(share_NE, rng), _all_tokens(shape), rng)


def _source_ragged(shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator) -> Int64:
    share_NE = _flat(shape) / np.arange(1, shape.num_experts + 1)
    tokens_N = rng.integers(_TOKENS // 8, 2 * _TOKENS, shape.num_ranks)
    return _draw(_drift(share_NE[:, order_E], rng), tokens_N, rng)


def _zero_expert_rank(
    shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator
) -> Int64:
    # Nobody wants the first rank's experts, and the last rank has no tokens.
    share_NE = _flat(shape)
    idle = min(max(1, shape.num_experts // shape.num_ranks), shape.num_experts - 1)
    share_NE[:, :idle] = 0
    tokens_N = _all_tokens(shape)
    tokens_N[-1] = 0
    return _draw(_drift(share_NE, rng), tokens_N, rng)


def _rotating_hotspot(
    shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator
) -> Int64:
    share_NE = _flat(shape)
    share_NE[:, order_E[step % shape.num_experts]] = shape.num_experts
    share_NE[:, order_E[(step + 1) % shape.num_experts]] = shape.num_experts / 2
    return _draw(share_NE, _all_tokens(shape), rng)


def _burst(shape: Geometry, order_E: Int64, step: int, rng: np.random.Generator) -> Int64:
    share_NE = _flat(shape)
    if step % 4 == 3:
        share_NE[:, order_E[0]] = 2 * shape.num_experts
    return _draw(_drift(share_NE, rng), _all_tokens(shape), rng)


WORKLOADS: Mapping[str, Callable[[Geometry, Int64, int, np.random.Generator], Int64]] = {
    "balanced": _balanced,
    "hot expert set": _hot_expert_set,
    "hot rank": _hot_rank,
    "spread hot experts": _spread_hot_experts,
    "source ragged": _source_ragged,
    "zero-expert rank": _zero_expert_rank,
    "rotating hotspot": _rotating_hotspot,
    "burst": _burst,
}
