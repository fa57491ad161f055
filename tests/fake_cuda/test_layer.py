"""One layer of two ranks on the labelled device, and deliberate faults that it must find."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_laer.cpu.ranks import RankPools
from tests.fake_cuda import findings
from tests.fake_cuda.allowed import DOWNLOAD, split
from tests.fake_cuda.device import Watched, observed
from tests.fake_cuda.entered import naming_a_card
from tests.fake_cuda.faults import FAULTS, KERNELS
from tests.fake_cuda.kernels import WRITES, interpreted, replaced_by_torch
from tests.one_layer import HIDDEN, TOKENS, one_layer

pytestmark = pytest.mark.races

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


def watch_fault(name: str) -> Watched:
    """Train with a fault; return the findings."""
    fault, error = FAULTS[name], ""
    with observed(interpreted if fault.scene == KERNELS else replaced_by_torch) as device:
        try:
            with fault.replaced():
                train("rows, flat", steps=2)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return device.watched(error=error)


_launched: set[str] = set()
_entered: set[str] = set()


@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_the_cpus_bits_and_waits_for_counts_alone(
    case: str, ranks: RankPools
) -> None:
    on_cpu = ranks(2).run(train, case)
    on_card = [one for one_queue in (False, True) for one in ranks(2).run(watch, case, one_queue)]
    for (watched, digests), expected in zip(on_card, 2 * on_cpu, strict=True):
        assert watched.races == watched.held_up == []
        assert split(watched.found)[0] == {DOWNLOAD}
        assert digests == expected
        assert watched.compiled_in_steps == []
        _launched.update(watched.launches)
        _entered.update(watched.entered)


# Functions of the flex dispatcher, of NCCL's groups over nodes, and of metrics.
_ELSEWHERE = {
    "layer/dispatch/flex.py:SlotFlexDispatcher.token_dispatch",
    "runtime/comm/process_groups.py:ranks_per_node",
    "telemetry/clock.py:StreamClock.catch_up",
    "telemetry/rank_memory.py:memory_use",
}


def test_every_kernel_was_launched_and_every_function_that_names_a_card_was_entered() -> None:
    """This rests on the test before."""
    assert _launched == set(WRITES)
    named = naming_a_card("layer/dispatch", "runtime/comm", "runtime/weights", "telemetry")
    assert named - _entered == _ELSEWHERE


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_with_its_place(name: str, ranks: RankPools) -> None:
    for watched in ranks(1).run(watch_fault, name):
        assert any(FAULTS[name].found in text for text in watched.report()), watched
