"""Distances between two runs, and the bounds they must keep."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields

import torch

from megatron_laer.cpu.training import Record
from megatron_laer.cpu.weights import Tensors

# Guards a division: a logged value of a layer that has none is 0 on both sides.
_TINY = 1e-30


@dataclass(frozen=True)
class Distance:
    """Distance between two runs: the largest relative differences.

    Gradients of the first step and final weights are compared by L2 distance of tensors. `losses`
    has steps and evaluations, `norms` gradient norms of steps. `logged` has Megatron's logged
    losses of MoE layers, for a layer or over all; 0 where it logs none.
    """

    grads: float
    losses: float
    norms: float
    weights: float
    logged: float = 0.0

    def within(self, bound: Distance) -> bool:
        pairs = zip(self.parts(), bound.parts(), strict=True)
        return all(mine <= allowed for mine, allowed in pairs)

    def times(self, factor: float) -> Distance:
        return Distance(*(factor * part for part in self.parts()))

    def at_least(self, smallest: float) -> Distance:
        return Distance(*(max(part, smallest) for part in self.parts()))

    def or_larger(self, other: Distance) -> Distance:
        return Distance(*map(max, self.parts(), other.parts()))

    def parts(self) -> tuple[float, ...]:
        return astuple(self)

    def __str__(self) -> str:
        names = (field.name for field in fields(self))
        pairs = zip(names, self.parts(), strict=True)
        return " ".join(f"{name} {part:.1e}" for name, part in pairs)


def distance(run: Record, reference: Record) -> Distance:
    """Return the distance of `run` from `reference`; both have the same steps and tensors.

    Values that neither run has count as equal: gradients, and norms without a training step.
    """
    assert run.moe_losses.keys() == reference.moe_losses.keys()
    has_gradients = bool(run.first_grads or reference.first_grads)
    trained = bool(run.grad_norms or reference.grad_norms)
    return Distance(
        grads=_tensors(run.first_grads, reference.first_grads) if has_gradients else 0.0,
        losses=_series(run.losses + run.eval_losses, reference.losses + reference.eval_losses),
        norms=_series(run.grad_norms, reference.grad_norms) if trained else 0.0,
        weights=_tensors(run.weights, reference.weights),
        logged=max(
            (_series(run.moe_losses[name], reference.moe_losses[name]) for name in run.moe_losses),
            default=0.0,
        ),
    )


def identical(run: Record, reference: Record) -> bool:
    return (
        run.losses == reference.losses
        and run.grad_norms == reference.grad_norms
        and run.weights.keys() == reference.weights.keys()
        and all(torch.equal(run.weights[key], reference.weights[key]) for key in run.weights)
    )


def _series(run: list[float], reference: list[float]) -> float:
    assert len(run) == len(reference) > 0
    assert all(math.isfinite(value) for value in run + reference)
    pairs = zip(run, reference, strict=True)
    return max(0.0 if a == b else abs(a - b) / max(abs(b), _TINY) for a, b in pairs)


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
