"""Generators of the workloads W0 to W7 of Megatron's imbalance benchmark, and of others by name.

They follow its description (Megatron-LM, pull request 7488). A workload depends on its name, a seed
and a step alone, and every token has K different experts. In W1 to W3 and W6, three tokens of four
choose among the hot experts: a quarter of all, and at least K.

We decide details that the description leaves open. The seed draws W1's hot experts, so that it
differs from W2, whose hot ones are the first, on neighbouring ranks of stock. W4's ranks have
between an eighth of the tokens and twice as many. The functions return counts, and experts of
tokens for a replay of the routing; no probabilities.

Legend: N ranks, E experts, T tokens of a rank, K experts of a token, M steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.tools.traces.natural import natural_counts
from megatron_laer.tools.traces.paper import paper_counts
from megatron_laer.tools.traces.records import Trace

# NumPy's limit on the cards of a draw, exclusive.
_CARDS = 10**9


@dataclass(frozen=True)
class WorkloadShape:
    """Sizes of a workload; `tokens` is T of each rank, from which W4's ranks deviate.

    Raises ValueError for tokens without enough different experts, or too many of both.
    """

    ranks: int
    experts: int
    topk: int
    tokens: int

    def __post_init__(self) -> None:
        if self.topk > self.experts:
            raise ValueError(
                f"a token cannot have {self.topk} of {self.experts} experts; take a top-k of at "
                f"most {self.experts}"
            )
        if 2 * self.tokens * self.experts >= _CARDS:
            raise ValueError(
                f"{self.tokens} tokens for {self.experts} experts are too many to draw; take fewer "
                f"than {_CARDS // 2 // self.experts}"
            )


@dataclass(frozen=True)
class Workload:
    """One workload, by the experts among which its tokens choose.

    `hot` returns the `hot_width` hot experts of a step, and `quarters` how many of four tokens
    choose among these. `title` is the name in Megatron's benchmark, without the number.
    """

    title: str
    hot: Callable[[WorkloadShape, int, int], Int64]
    quarters: Callable[[int], int] = lambda step: 3


def hot_width(shape: WorkloadShape) -> int:
    return max(shape.topk, shape.experts // 4)


def _first(shape: WorkloadShape, seed: int, step: int) -> Int64:
    return np.arange(hot_width(shape))


def _drawn(shape: WorkloadShape, seed: int, step: int) -> Int64:
    order_E = np.random.default_rng(seed).permutation(shape.experts)
    return order_E[: hot_width(shape)]


def _spread(shape: WorkloadShape, seed: int, step: int) -> Int64:
    return _first(shape, seed, step) * shape.experts // hot_width(shape)


def _second_half(shape: WorkloadShape, seed: int, step: int) -> Int64:
    return np.arange(shape.experts // 2, shape.experts)


def _rotating(shape: WorkloadShape, seed: int, step: int) -> Int64:
    begin = step // 3 * hot_width(shape)
    return (begin + _first(shape, seed, step)) % shape.experts


WORKLOADS: Mapping[str, Workload] = {
    "W0": Workload("balanced", _first, lambda step: 0),
    "W1": Workload("hot expert set", _drawn),
    "W2": Workload("hot rank", _first),
    "W3": Workload("spread hot experts", _spread),
    "W4": Workload("source ragged", _first, lambda step: 0),
    "W5": Workload("zero expert rank", _second_half, lambda step: 4),
    "W6": Workload("rotating hotspot", _rotating),
    "W7": Workload("burst", _first, lambda step: 2 if step % 4 == 3 else 0),
}
NATURAL, PAPER, PAPER_FIRST = "natural", "paper", "paper-first"
# All that is not of Megatron's benchmark.
_OTHERS: Mapping[str, tuple[str, Callable[[int, int, int, int, int, int], Int64]]] = {
    NATURAL: ("as in runs", natural_counts),
    PAPER: ("as in LAER-MoE's", paper_counts),
    PAPER_FIRST: ("as in its first five iterations", partial(paper_counts, first=True)),
}
# Of all made-up routing, for the command line.
TITLES: Mapping[str, str] = {name: title for name, (title, _) in _OTHERS.items()} | {
    name: workload.title for name, workload in WORKLOADS.items()
}


def workload_counts(name: str, shape: WorkloadShape, step: int, seed: int = 0) -> Int64:
    """Return counts_NE, int64 [N, E], of one step of a workload.

    Raises ValueError for an unknown name, or for too few experts for so many per token.
    """
    if name in _OTHERS:
        return _OTHERS[name][1](*(shape.ranks, shape.experts, shape.topk, shape.tokens), step, seed)
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; use one of {', '.join(TITLES)}")
    workload, quarters = WORKLOADS[name], WORKLOADS[name].quarters(step)
    hot = workload.hot(shape, seed, step)
    if quarters and len(hot) < shape.topk:
        raise ValueError(
            f"{name} routes to {len(hot)} of {shape.experts} experts, too few for a top-k of "
            f"{shape.topk}; take a top-k of at most {len(hot)}"
        )
    rng = np.random.default_rng([int(name[1:]), seed, step])
    everyone = np.arange(shape.experts)
    tokens_N = np.full(shape.ranks, shape.tokens)
    if name == "W4":
        tokens_N = rng.integers(shape.tokens // 8, 2 * shape.tokens + 1, shape.ranks)
    counts_NE = np.zeros((shape.ranks, shape.experts), dtype=np.int64)
    for counts_E, tokens in zip(counts_NE, tokens_N.tolist(), strict=True):
        if name == "W0":
            counts_E += np.bincount(
                np.arange(tokens * shape.topk) % shape.experts, minlength=shape.experts
            )
            continue
        to_hot = tokens * quarters // 4
        counts_E[hot] += _chosen(len(hot), to_hot, shape.topk, rng)
        counts_E += _chosen(len(everyone), tokens - to_hot, shape.topk, rng)
    return counts_NE


def _chosen(experts: int, tokens: int, topk: int, rng: np.random.Generator) -> Int64:
    """Draw the number of tokens of each expert, where tokens choose K different ones uniformly.

    Equivalent to drawing without replacement from as many cards of each expert as there are tokens.
    No expert exceeds the tokens; mean and variance are those of choosing tokens.
    """
    cards = np.full(experts, tokens)
    return rng.multivariate_hypergeometric(cards, tokens * topk, method="marginals")


def experts_of_tokens(counts_E: Int64, topk: int) -> Int64:
    """Return the experts of each token, int64 [T, K], for tokens with these total counts.

    They are dealt out like sorted cards, so that a token has no expert twice.
    """
    tokens = int(counts_E.sum()) // topk
    assert counts_E.sum() == tokens * topk and counts_E.max(initial=0) <= tokens
    return np.repeat(np.arange(len(counts_E)), counts_E).reshape(topk, tokens).T


def workload_trace(
    name: str,
    shape: WorkloadShape,
    steps: int,
    seed: int = 0,
    *,
    layers: int = 1,
    microbatches: int = 1,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Trace:
    """Make a trace of layers, each drawn with a seed of its own."""
    axes = np.indices((steps, layers, microbatches), dtype=np.int64)
    step_R, layer_R, microbatch_R = (axis.reshape(-1) for axis in axes)
    drawn_R = step_R * microbatches + microbatch_R
    counts_RNE = np.stack(
        [
            workload_counts(name, shape, int(drawn_R[record]), seed + int(layer_R[record]))
            for record in progress(range(len(drawn_R)))
        ]
    )
    names = tuple(f"layer {layer + 1}" for layer in range(layers))
    return Trace(names, step_R, layer_R, microbatch_R, counts_RNE.astype(np.int32))
