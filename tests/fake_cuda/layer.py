"""One FSEP layer on the labelled device or the CPU, trained for a few steps."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tests.fake_cuda import findings
from tests.fake_cuda.clocks import Watched
from tests.fake_cuda.faults import FAULTS
from tests.fake_cuda.kernels import interpreted, replaced_by_torch
from tests.fake_cuda.observing import observed
from tests.one_layer import HIDDEN, TOKENS, one_layer

CASES: dict[str, dict[str, Any]] = {
    "rows, flat": {"sharding": "rows", "restore_algorithm": "flat"},
    "rows, tokens by node": {
        "sharding": "rows",
        "restore_algorithm": "node",
        "token_exchange": "node",
    },
    "experts, flat": {"sharding": "experts", "restore_algorithm": "flat"},
    "experts, by relay": {"sharding": "experts", "restore_algorithm": "node"},
}
"""Fields of `FSEPConfig`, for nodes of one rank."""


def train(case: str, steps: int = 3) -> list[str]:
    """Train under random layouts; return digests of each step's output and gradients."""
    import megatron_laer

    settings = {"token_exchange": "rank", "planner": "random"} | CASES[case]
    device, found = torch.cuda.current_device(), []
    torch.manual_seed(0)  # for weights of the router and shared experts
    with one_layer("gloo", "shared experts", **settings) as layer, _no_state_of_megatron():
        for step in range(steps):
            torch.manual_seed(step)
            hidden = torch.randn(TOKENS, 1, HIDDEN).to(device).requires_grad_()
            with megatron_laer.training_step(step, 1):
                layer.zero_grad_buffer()
                findings.current.is_steady = step > 0
                output, _ = layer(hidden)
                output.backward(torch.ones_like(output))
                findings.current.is_steady = False
            assert hidden.grad is not None
            grads = [parameter.main_grad for parameter in layer.parameters()]
            found += [_digest(part) for part in (output, hidden.grad, *grads)]
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


def watch(case: str, one_queue: bool) -> tuple[Watched, list[str]]:
    with observed(interpreted, one_queue=one_queue) as device:
        digests = train(case)
    return device.watched(), digests


def watch_fault(name: str) -> tuple[Watched, str]:
    """Train with a fault; return the findings, and the error that ended the run, or ""."""
    fault, error = FAULTS[name], ""
    kernels = interpreted if fault.interprets else replaced_by_torch
    with observed(kernels) as device, contextlib.ExitStack() as stack:
        stack.enter_context(fault.replaced())
        try:
            train("rows, flat", steps=2)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return replace(device.watched()), error
