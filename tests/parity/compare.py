"""Distances between two runs, and the bounds they must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tests.parity.training import Record
from tests.parity.weights import Tensors


@dataclass(frozen=True)
class Distance:
    """How far two runs are apart.

    Attributes:
        grads: largest relative L2 distance of a tensor's gradient in the first step.
        losses: largest relative difference of a step's loss.
        norms: largest relative difference of a step's gradient norm.
        weights: largest relative L2 distance of a final weight.
    """

    grads: float
    losses: float
    norms: float
    weights: float

    def within(self, bound: Distance) -> bool:
        """Whether no part exceeds the bound's."""
        pairs = zip(self.parts(), bound.parts(), strict=True)
        return all(mine <= allowed for mine, allowed in pairs)

    def times(self, factor: float) -> Distance:
        """A bound `factor` times as wide."""
        return Distance(*(factor * part for part in self.parts()))

    def parts(self) -> tuple[float, float, float, float]:
        """In the order of the attributes."""
        return self.grads, self.losses, self.norms, self.weights

    def __str__(self) -> str:
        names = ("grads", "losses", "norms", "weights")
        pairs = zip(names, self.parts(), strict=True)
        return " ".join(f"{name} {part:.1e}" for name, part in pairs)


def distance(run: Record, reference: Record) -> Distance:
    """How far `run` is from `reference`; both have the same steps and the same tensors."""
    return Distance(
        grads=_tensors(run.first_grads, reference.first_grads),
        losses=_series(run.losses, reference.losses),
        norms=_series(run.grad_norms, reference.grad_norms),
        weights=_tensors(run.weights, reference.weights),
    )


def identical(run: Record, reference: Record) -> bool:
    """Whether two runs agree in every bit that was recorded."""
    return (
        run.losses == reference.losses
        and run.grad_norms == reference.grad_norms
        and run.weights.keys() == reference.weights.keys()
        and all(torch.equal(run.weights[key], reference.weights[key]) for key in run.weights)
    )


def _series(run: list[float], reference: list[float]) -> float:
    assert len(run) == len(reference) > 0
    assert all(math.isfinite(value) for value in run + reference)
    return max(abs(a - b) / abs(b) for a, b in zip(run, reference, strict=True))


def _tensors(run: Tensors, reference: Tensors) -> float:
    assert run.keys() == reference.keys() and run, sorted(run.keys() ^ reference.keys())
    return max(_relative_l2(run[key], reference[key]) for key in run)


def _relative_l2(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    assert tensor.shape == reference.shape
    size = torch.linalg.vector_norm(reference.double()).item()
    gap = torch.linalg.vector_norm(tensor.double() - reference.double()).item()
    if size == 0.0:  # an expert that no token chose has no gradient on either side
        return 0.0 if gap == 0.0 else math.inf
    return gap / size
