"""Training of one layer or two, the smallest program with all overlaps, in several cases.

Restores run ahead in forward and backward, reduces wait for the tokens' gradients, layouts change
after the gate. Megatron's own loop is in `tests/races/training.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.fake_cuda import device, findings
from tests.fake_cuda.device import Watched
from tests.fake_cuda.fault import Fault
from tests.fake_cuda.kernels import Kernels, interpreted, replaced_by_torch
from tests.one_layer import HIDDEN, TOKENS, one_layer
from tests.parity.row import REPLICAS_PAY


class Case(NamedTuple):
    """Fields of `FSEPConfig`, for nodes of one rank; layers as in `one_layer`, and kernels."""

    settings: dict[str, Any]
    layers: int = 1
    kernels: Kernels = interpreted
    repeats: bool = False


_RANDOM = {"planner": "random"}
CASES = {
    "rows, flat": Case(_RANDOM),
    "rows, tokens by node": Case(_RANDOM | {"restore_algorithm": "node", "token_exchange": "node"}),
    "experts, flat": Case(_RANDOM | {"sharding": "experts"}),
    "experts, by relay": Case(_RANDOM | {"sharding": "experts", "restore_algorithm": "node"}),
    "rows, verified": Case(_RANDOM | {"verify": "all"}),
    "experts, verified": Case(_RANDOM | {"sharding": "experts", "verify": "all"}),
    "ahead": Case(_RANDOM, 2, replaced_by_torch),
    "a layer passed twice": Case(_RANDOM, 2, replaced_by_torch, repeats=True),
    "fresh layouts": Case({"plan_mode": "exact"}, 2, replaced_by_torch),
    "layouts that change after the gate": Case(
        {
            "capacity": 2,  # with more slots the first layouts are the best
            "plan_mode": "adaptive",
            "planner": "greedy",
            "imbalance_tolerance": 0.0,
            "cluster": str(REPLICAS_PAY),
        },
        *(2, replaced_by_torch),
    ),
    "held over a step": Case(_RANDOM | {"restore": "step"}, 2, replaced_by_torch),
    "gradients left to autograd": Case(_RANDOM, 0, replaced_by_torch),
}


def train(name: str, steps: int = 3) -> list[str]:
    """Train a case; return digests of each step's outputs and gradients."""
    import megatron_laer

    case, found = CASES[name], list[str]()
    settings = {"token_exchange": "rank", "sharding": "rows", "restore_algorithm": "flat"}
    settings |= case.settings
    microbatches = 2 if case.layers > 1 else 1
    torch.manual_seed(0)  # for weights of the router and shared experts
    with (
        one_layer(
            "gloo", "shared experts", layers=case.layers, repeats=case.repeats, **settings
        ) as model,
        _no_state_of_megatron(),
    ):
        if case.layers > 1:  # else kernels would be compiled before the first step in any case
            model.eval()
            with torch.inference_mode():  # whose tensors training cannot use
                model(_input())
            model.train()
        for step in range(steps):
            torch.manual_seed(step)
            inputs = [_input().requires_grad_() for _ in range(microbatches)]
            chunks = [model] if case.layers > 1 else []
            with megatron_laer.training_step(step, microbatches, chunks):
                findings.current.is_steady = step > 0
                outputs = []
                for hidden in inputs:
                    output, _ = model(hidden)
                    output.backward(torch.ones_like(output))
                    outputs.append(output)
                findings.current.is_steady = False
                grads = [_update(parameter) for parameter in model.parameters()]
            found += [_digest(part) for part in (*outputs, *grads)]
            found += [_digest(hidden.grad) for hidden in inputs if hidden.grad is not None]
    return found


def _input() -> torch.Tensor:
    return torch.randn(TOKENS, 1, HIDDEN).to(torch.cuda.current_device())


@torch.no_grad()
def _update(parameter: Any) -> torch.Tensor:
    """Step by a parameter's gradient, and return that."""
    grad = getattr(parameter, "main_grad", parameter.grad)
    parameter.add_(grad, alpha=-1e-2)
    found: torch.Tensor = grad.clone()
    grad.zero_()
    return found


@contextlib.contextmanager
def _no_state_of_megatron() -> Iterator[None]:
    """Remove tensors that Megatron keeps, which may be another device's."""
    from megatron.core.transformer.moe import moe_logging
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    def remove() -> None:
        moe_logging.destroy_moe_metrics_tracker()
        MoEAuxLossAutoScaler.main_loss_backward_scale = None

    remove()
    try:
        yield
    finally:
        remove()


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def watch(case: str, one_queue: bool = False, fault: Fault | None = None) -> Watched:
    """Train on the labelled device, with a fault or none, and digests as results."""
    steps, kernels = 2 if fault else 3, CASES[case].kernels
    # Where a fault is verified first, its files are written into the working folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return device.watch(lambda: train(case, steps), fault, kernels=kernels, one_queue=one_queue)
