"""Megatron-Bridge's own LoRA on experts at home trains as in stock, and is exported as stock's.

Needs a checkout of Megatron-Bridge in the folder MEGATRON_BRIDGE_CHECKOUT. The export also needs
its dependencies, as `test_bridge_weights.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_laer.cpu.training import Adapt, Record, train
from tests.bridge_stubs import importable, peft_importable
from tests.checkouts import checkout
from tests.checkpoints import assert_equal
from tests.distributed.conftest import Trainings, train_grouped
from tests.distributed.test_bridge_weights import HOMES, QWEN3, exported
from tests.parity.compare import distance
from tests.parity.replay import train_row
from tests.parity.row import FP32_BOUND
from tests.parity.rows import DIST_OPT

CHECKOUT, pytestmark = checkout("MEGATRON_BRIDGE_CHECKOUT", "Megatron-Bridge 0.6")

EXPERTS = ["*.experts.*.linear_fc1", "*.experts.*.linear_fc2"]
CANONICAL = [EXPERTS[0] + "_gate", EXPERTS[0] + "_up", EXPERTS[1]]
ALL = ["linear_qkv", "linear_proj", *EXPERTS]

# At a higher rate a token changes its expert in one of two stock runs.
SLOWER = " --lr 3e-3 --min-lr 3e-3"


def lora(model: torch.nn.Module, targets: list[str], *, canonical: bool = False) -> None:
    with peft_importable(CHECKOUT):
        apply_lora(model, targets, canonical=canonical)


def apply_lora(model: torch.nn.Module, targets: list[str], *, canonical: bool = False) -> None:
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.lora import LoRA

    # Without Transformer Engine, Megatron has its layers' names for None.
    with mock.patch.object(utils, "HAVE_TE", False):
        (CanonicalLoRA if canonical else LoRA)(target_modules=targets, dim=4, alpha=8)(model)


def grouped_lora(model: torch.nn.Module, kind: str) -> None:
    """Adapt grouped experts as `LoRA.transform` does, which knows Transformer Engine's alone."""
    with peft_importable(CHECKOUT):
        from megatron.bridge.peft import utils
        from megatron.bridge.peft.lora_layers import LoRALinear

        model.requires_grad_(False)
        found = [
            (f"{name}.{linear}", module, linear)
            for name, module in model.named_modules()
            for linear in ("linear_fc1", "linear_fc2")
            if name.endswith(".experts")
        ]
        for name, experts, linear in found:
            inner: Any = getattr(experts, linear)
            rows, columns = inner.weight0.shape
            more: dict[str, Any] = {"num_local_experts": inner.num_gemms}
            more["params_device"] = inner.weight0.device
            if kind == "ParallelLinearAdapter":
                more = {"is_expert": True}
            adapter = getattr(utils, kind)(
                columns,
                rows,
                4,
                base_linear_name=name,
                activation="identity",
                input_is_parallel=linear == "linear_fc2",
                model_parallel_config=inner.config,
                alpha=8,
                **more,
            )
            setattr(experts, linear, LoRALinear(inner, adapter))


@pytest.mark.parametrize(
    ("adapt", "by"),
    [
        (partial(lora, targets=EXPERTS[:1]), train_row),
        (partial(lora, targets=EXPERTS[1:]), train_row),
        (partial(lora, targets=CANONICAL, canonical=True), train_row),
        (partial(lora, targets=ALL), train_row),
        (partial(grouped_lora, kind="GroupedExpertLinearAdapter"), train_grouped),
        (partial(grouped_lora, kind="ParallelLinearAdapter"), train_grouped),
        (partial(grouped_lora, kind="SharedOuterGroupedExpertAdapter"), train_grouped),
    ],
    ids=["fc1", "fc2", "canonical", "all", "packed", "shared", "outer shared"],
)
def test_bridges_lora_on_experts_trains_as_in_stock(
    trained: Trainings, adapt: Adapt, by: Callable[..., Record]
) -> None:
    stock, homes = (
        trained(DIST_OPT + mode + SLOWER, None, adapt, by=by, steps=12) for mode in ("", HOMES)
    )
    trained = [name for name, gradient in homes.first_grads.items() if gradient.any()]
    assert trained and all(".adapter." in name for name in trained)
    apart = distance(homes, stock)
    print(apart)
    assert apart.within(FP32_BOUND)


def exported_after(flags: list[str], merges: bool) -> dict[str, torch.Tensor]:
    """Return the weights after some steps, adapters merged or left out."""
    export = partial(exported, merge_adapter_weights=merges)
    with importable(CHECKOUT):
        record = train(flags, export, adapt=partial(apply_lora, targets=ALL))
    found: dict[str, torch.Tensor] = record.probes[-1]
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_experts_with_adapters_are_exported_as_stocks(trained: Trainings) -> None:
    for merges in (True, False):
        stock, homes = (
            trained(QWEN3 + mode, merges, by=exported_after, experts=4, steps=2)
            for mode in ("", HOMES)
        )
        assert any(".experts." in name for name in homes)
        assert_equal(homes, stock)
