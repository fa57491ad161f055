"""Adapters on experts that replicas cannot follow, and freezing on some ranks only, are refused.

Rows of the parity table show that LoRA on attention and on experts at home equals stock's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_laer.cpu.training import Adapt, rank_of_environment
from megatron_laer.rules import STRATEGIES
from tests.distributed.conftest import Trainings, train_grouped
from tests.distributed.test_home_order import homes
from tests.parity.adapted import LowRank
from tests.parity.bridge_lora import LoRALinear, adapt_experts
from tests.parity.replay import train_row
from tests.parity.rows import FSDP


def wrapped(model: torch.nn.Module, name: str) -> None:
    for module in [*model.modules()]:
        child: Any = getattr(module, name, None)
        if isinstance(child, torch.nn.Module) and not hasattr(child, "weight"):
            child.weight = torch.nn.Parameter(torch.zeros(4, 4))
            setattr(module, name, LowRank(child))


def wrapped_at_home(model: torch.nn.Module) -> None:
    for name, module in [*model.named_modules()]:
        if name.endswith("local_experts.0"):
            module.linear_fc1 = LowRank(module.linear_fc1)  # type: ignore[arg-type]


def shared_on_a_rank_alone(model: torch.nn.Module) -> None:
    adapt_experts(model, shared=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter._backward_hooks is not None
            parameter._backward_hooks.clear()


def scaled_on_rank_1(model: torch.nn.Module) -> None:
    adapt_experts(model, ["linear_fc2"])
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.adapter.alpha = 8 * (1 + rank_of_environment())  # type: ignore[assignment]


def with_an_activation(model: torch.nn.Module) -> None:
    adapt_experts(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.adapter.activation = torch.nn.ReLU()


def replaced(model: torch.nn.Module) -> None:
    for module in [*model.modules()]:
        if hasattr(module, "experts"):
            module.experts = torch.nn.Linear(4, 4)


def frozen_on_rank_1(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if rank_of_environment() == 1 and "layers.0.mlp.experts.linear_fc2" in name:
            parameter.requires_grad = False


FSEP = " --expert-parallel-mode fsep --fsep-sharding "
DELAYED = "--overlap-dispatch-backward-with-experts-wgrad"
WAY_OUT = "give as targets layers of attention alone"


@dataclass(frozen=True)
class Case:
    """Model that is refused, its sharding and further flags, and parts of the message."""

    adapt: Adapt
    flags: str
    said: tuple[str, ...]
    kind: str = "RefusedError"
    grouped: bool = False


CASES = {
    "wrapped": Case(
        partial(wrapped, name="linear_fc1"),
        "rows",
        ("layer 1: its experts have _activation.linear_fc1 (LowRank)", "slices", WAY_OUT),
    ),
    "wrapped at home": Case(
        wrapped_at_home,
        "experts",
        ("layer 1: its experts have local_experts.0.linear_fc1 (LowRank)", WAY_OUT),
    ),
    "LoRA on rows": Case(
        adapt_experts,
        "rows",
        ("no 'weight': FSEP computes experts from slices", WAY_OUT),
        "AttributeError",
    ),
    "replaced at home": Case(
        replaced, "experts", ("rank 0: layer 1: its experts were replaced by Linear", WAY_OUT)
    ),
    "dropout": Case(
        partial(adapt_experts, dropout=0.1), "experts", ("has dropout=0.1: replicas would draw",)
    ),
    "activation": Case(with_an_activation, "experts", ("an adapter has an activation, ReLU()",)),
    "shared on a rank": Case(
        shared_on_a_rank_alone, "experts", ("set share_expert_adapters=False",), grouped=True
    ),
    "delayed weights": Case(
        adapt_experts, f"experts {DELAYED}", (f"with {DELAYED}: no test proves adapters",)
    ),
    "other homes": Case(
        adapt_experts, "experts{homes}", ("--fsep-homes gives experts other homes",)
    ),
    "unlike on a rank": Case(scaled_on_rank_1, "experts", ("adapters of experts is ",)),
    "Megatron-FSDP": Case(
        adapt_experts,
        f"experts{FSDP}{STRATEGIES[-1]}",
        ("with --use-megatron-fsdp: no test proves the two together",),
        "ValueError",
    ),
    "frozen on a rank": Case(
        frozen_on_rank_1, "rows", ("frozen experts is ", "layer 1: [1] on rank 1")
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_adapters_that_replicas_cannot_follow_are_refused_on_every_rank(
    trained: Trainings, tmp_path: Path, case: Case
) -> None:
    flags = FSEP + case.flags.format(homes=homes(tmp_path, 1))
    by = train_grouped if case.grouped else train_row
    message = trained.refused(flags, None, case.adapt, by=by, kind=case.kind, steps=1)
    assert [part for part in case.said if part not in message] == [], message
