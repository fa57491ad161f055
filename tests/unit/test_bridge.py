"""FSEP's callback for Megatron-Bridge and its check of recipes, without Megatron-Bridge."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_laer import FSEPConfig
from megatron_laer.choices import LatePlan
from megatron_laer.integrations import bridge
from megatron_laer.integrations.bridge import FSEPCallback, check_recipe
from megatron_laer.integrations.bridge_config import settings_of
from tests.bridge_recipes import OVERLAP, REFUSED, changed, recipe


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the launcher's variables."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(name: str) -> None:
    given, says = REFUSED[name]
    with pytest.raises(ValueError, match="cannot run this recipe") as refused:
        check_recipe(given, FSEPConfig())
    assert says in str(refused.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    given = changed("dist", use_decentralized_pg=True)
    given.model.moe_paged_stash = True
    with pytest.raises(ValueError, match=r"--moe-paged-stash[^\n]*\n *dist.use_decentralized_pg"):
        check_recipe(given, FSEPConfig())


@pytest.mark.parametrize(
    "given",
    [
        recipe(),
        changed("comm_overlap", **OVERLAP),
        changed("mixed_precision", fp8=None, bf16=True),
        changed("peft", target_modules=["linear_qkv", "*.self_attention.*"]),
        changed("peft", target_modules=["*linear_fc*"], dropout=0.0),
        recipe(cpu_offloading=False, cpu_offloading_num_layers=95),
    ],
    ids=["plain", "overlap", "precision", "lora on attention", "lora on experts", "no offload"],
)
def test_what_works_is_accepted(given: SimpleNamespace) -> None:
    check_recipe(given, FSEPConfig())


def lora(*targets: str, **more: object) -> SimpleNamespace:
    return changed("peft", target_modules=[*targets], **more)


MUON = changed("optimizer", optimizer="muon")
ON_EXPERTS = ("*.layers.0.*.linear_fc1", "*linear_fc*", "linear_fc1_up")


@pytest.mark.parametrize(
    ("given", "sharding"),
    [
        (lora("linear_qkv"), "auto"),
        *((lora("linear_qkv", target), "experts") for target in ON_EXPERTS),
        (MUON, "experts"),
    ],
)
def test_lora_on_experts_and_muon_have_experts_at_home(
    given: SimpleNamespace, sharding: str
) -> None:
    with mock.patch.object(bridge, "enable") as enable:
        FSEPCallback(given, FSEPConfig())
    assert enable.call_args.args[0].sharding == sharding


IN_PARTS = lora("linear_fc2")
IN_PARTS.comm_overlap = SimpleNamespace(
    overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True
)
ANOTHER_KIND = lora("linear_fc2")
ANOTHER_KIND.peft = type("DoRA", (), vars(ANOTHER_KIND.peft))()


@pytest.mark.parametrize(
    ("given", "config", "says"),
    [
        (changed("dist", use_decentralized_pg=True), {}, "dist.use_decentralized_pg"),
        (recipe(), {"capacity": 1}, "--fsep-capacity 1: the slots of"),
        *((lora(target), {"sharding": "rows"}, "or give target_modules") for target in ON_EXPERTS),
        (lora(ON_EXPERTS[0]), {"planner": "laer"}, "have too, with --fsep-sharding rows: "),
        (MUON, {"sharding": "rows"}, "--optimizer muon with --fsep-sharding rows: "),
        (MUON, {"planner": "laer"}, "--optimizer muon with --fsep-sharding rows: "),
        (IN_PARTS, {"sharding": "experts"}, "--delay-wgrad-compute: no test proves adapters"),
        (lora("linear_fc2"), {"homes": "f"}, "--fsep-homes f with Megatron-Bridge: it conv"),
        (ANOTHER_KIND, {"sharding": "experts"}, "with peft=DoRA: replicas know LoRA and Canon"),
    ],
)
def test_settings_that_a_recipe_cannot_have_are_refused_and_turn_nothing_on(
    given: SimpleNamespace, config: dict[str, Any], says: str
) -> None:
    with mock.patch.object(bridge, "enable") as enable, pytest.raises(ValueError, match=says):
        FSEPCallback(given, FSEPConfig(**config))
    enable.assert_not_called()


def test_a_recipe_is_read_as_bridge_applies_it_and_is_not_changed() -> None:
    given = recipe(delay_wgrad_compute=True)
    given.comm_overlap = SimpleNamespace(**OVERLAP)
    given.ddp.use_distributed_optimizer = True
    settings = settings_of(given)
    assert (settings.delay_wgrad_compute, settings.overlap_grad_reduce) == (False, True)
    assert given.model.delay_wgrad_compute is True
    given.model = SimpleNamespace(transformer=given.model)
    assert settings_of(given).num_experts == 8


def test_the_callback_turns_fsep_on_and_marks_steps() -> None:
    microbatches = mock.Mock(**{"get_num_microbatches.return_value": 2})
    given, steps = recipe(deterministic_mode=True), mock.MagicMock()
    train_state = SimpleNamespace(step=3)
    state = SimpleNamespace(train_state=train_state, cfg=given)
    context = SimpleNamespace(state=state, model=["chunk"])
    with (
        mock.patch.object(bridge, "enable") as enable,
        mock.patch.object(bridge, "training_step", steps),
        mock.patch.object(bridge, "install_metrics") as install,
        mock.patch.dict(sys.modules, {"megatron.core.num_microbatches_calculator": microbatches}),
    ):
        callback = FSEPCallback(given, FSEPConfig(capacity=4))
        callback.on_train_start(context)
        for train_state.step in (3, 4):
            callback.on_train_step_start(context)
            callback.on_train_step_end(context)
    enable.assert_called_once_with(FSEPConfig(capacity=4, late_plan=LatePlan.WAIT), seed=7)
    install.assert_called_once_with(5, 2, 0)
    assert steps.call_args_list == [mock.call(step, 2, ["chunk"]) for step in (3, 4)]
    assert [name for name, *_ in steps.mock_calls] == ["", "().__enter__", "().__exit__"] * 2
