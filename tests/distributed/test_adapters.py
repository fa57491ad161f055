"""Adapters on experts that replicas cannot follow, and freezing on some ranks only, are refused.

Rows of the parity table show that LoRA on attention and on experts at home equals stock's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_laer.cpu.ranks import Raised, RankPool, RankPools
from megatron_laer.cpu.training import Adapt, rank_of_environment
from megatron_laer.rules import STRATEGIES
from tests.distributed.test_home_names import train_some
from tests.distributed.test_home_order import homes
from tests.parity.adapted import LowRank
from tests.parity.bridge_lora import LoRALinear, adapt_experts
from tests.parity.flags import command_line
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


def adapted_in_part(model: torch.nn.Module) -> None:
    adapt_experts(model)
    for name, module in [*model.named_modules()]:
        if name.endswith("local_experts.0"):
            module.linear_fc1 = module.linear_fc1.to_wrap  # type: ignore[union-attr]


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


def asked(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith("linear_fc1"):
            module.config.sequence_parallel  # type: ignore[union-attr]  # noqa: B018


def replaced(model: torch.nn.Module) -> None:
    for module in [*model.modules()]:
        if hasattr(module, "experts"):
            module.experts = torch.nn.Linear(4, 4)


def frozen_on_rank_1(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if rank_of_environment() == 1 and "layers.0.mlp.experts.linear_fc2" in name:
            parameter.requires_grad = False


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize(
    ("adapt", "sharding", "kind", "said"),
    [
        (
            partial(wrapped, name="linear_fc1"),
            "rows",
            "RefusedError",
            "rank 0: layer 1: its experts have _activation.linear_fc1 (LowRank)",
        ),
        (
            wrapped_at_home,
            "experts",
            "RefusedError",
            "rank 0: layer 1: its experts have local_experts.0.linear_fc1 (LowRank)",
        ),
        (adapt_experts, "rows", "AttributeError", "no 'weight': FSEP computes experts from slices"),
        (replaced, "rows", "RefusedError", "rank 0: layer 1: its experts were replaced by Linear"),
        (replaced, "experts", "RefusedError", "layer 1: its experts were replaced by Linear"),
        (asked, "rows", "AttributeError", "a linear layer of experts has no 'config'"),
    ],
    ids=[
        *("wrapped", "wrapped at home", "LoRA on rows", "replaced", "replaced at home"),
        "asked for a linear layer's attributes",
    ],
)
def test_adapters_on_experts_are_refused_with_the_way_out(
    ranks: RankPools, text_data: str, adapt: Adapt, sharding: str, kind: str, said: str
) -> None:
    message = refusal(ranks(2), text_data, adapt, kind, sharding)
    assert said in message
    assert ("slices" in message) == (sharding == "rows")
    assert "give as targets layers of attention alone" in message


FSEP = " --expert-parallel-mode fsep --fsep-sharding"
DELAYED = " --overlap-dispatch-backward-with-experts-wgrad"
IN_FP8 = " --bf16 --fp8-format e4m3 --fp8-recipe blockwise --fsep-allow-unproven fp8-experts"


@pytest.mark.counts(fault_runs=1)
@pytest.mark.parametrize(
    ("adapt", "grouped", "flags", "said"),
    [
        (partial(adapt_experts, dropout=0.1), False, "", "has dropout=0.1: replicas would draw"),
        (adapted_in_part, False, "", "3 of 4 home experts have adapters"),
        (with_an_activation, False, "", "an adapter has an activation, ReLU()"),
        (shared_on_a_rank_alone, True, "", "set share_expert_adapters=False"),
        (adapt_experts, False, IN_FP8, "fp8 experts have them"),
        (adapt_experts, False, DELAYED, f"with {DELAYED.strip()}: no test proves adapters"),
        (scaled_on_rank_1, False, "", "adapters of experts is "),
    ],
    ids=[
        *("dropout", "some experts", "activation", "shared on a rank", "fp8", "delayed weights"),
        "unlike on a rank",
    ],
)
def test_adapters_that_replicas_cannot_follow_are_refused(
    ranks: RankPools, text_data: str, adapt: Adapt, grouped: bool, flags: str, said: str
) -> None:
    message = refusal(ranks(2), text_data, adapt, "RefusedError", "experts" + flags, grouped)
    assert said in message


@pytest.mark.counts(fault_runs=1)
def test_adapters_next_to_megatron_fsdp_are_refused(ranks: RankPools, text_data: str) -> None:
    flags = f"experts{FSDP}{STRATEGIES[-1]}"
    message = refusal(ranks(2), text_data, adapt_experts, "ValueError", flags)
    assert "with --use-megatron-fsdp: no test proves the two together" in message


@pytest.mark.counts(fault_runs=1)
def test_adapters_of_experts_with_other_homes_are_refused(
    ranks: RankPools, text_data: str, tmp_path: Path
) -> None:
    flags = "experts" + homes(tmp_path, 1)
    given = command_line(text_data, f"{FSEP} {flags}", steps=1), None
    for result in ranks(2).run_raw(train_row, *given, adapt_experts):
        assert isinstance(result, Raised) and result.type_name == "RefusedError"
        assert "--fsep-homes gives experts other homes" in result.message
        assert "data_parallel.py" in result.traceback, "before data and checkpoints are read"


@pytest.mark.counts(fault_runs=1)
def test_weights_that_some_ranks_freeze_are_named_on_every_rank(
    ranks: RankPools, text_data: str
) -> None:
    message = refusal(ranks(2), text_data, frozen_on_rank_1, "RefusedError", "rows")
    assert "frozen experts is " in message and "layer 1: [1] on rank 1" in message


def refusal(
    pool: RankPool, data: str, adapt: Adapt, kind: str, sharding: str, grouped: bool = False
) -> str:
    fsep = f"{FSEP} {sharding}"
    flags = command_line(data, fsep, steps=1)
    given = (train_some, flags, None, True) if grouped else (train_row, flags, None)
    raised = pool.run_raw(*given, adapt)
    assert all(isinstance(result, Raised) for result in raised)
    assert {result.type_name for result in raised} == {kind}
    (message,) = {result.message for result in raised}
    return str(message)
