"""FSEP's callback for Megatron-Bridge and the judgement of recipes, without Megatron-Bridge."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_laer import FSEPConfig
from megatron_laer.config import LatePlan
from megatron_laer.integrations import bridge, hugging_face
from megatron_laer.integrations.bridge import FSEPCallback, check_recipe
from megatron_laer.integrations.bridge_config import settings_of
from megatron_laer.plugin.steps import StepOutcome
from megatron_laer.tools import cli
from megatron_laer.tools.cli import check_recipe as command


def recipe(**model: Any) -> SimpleNamespace:
    fields = {
        "num_moe_experts": 8,
        "num_layers": 2,
        "mtp_num_layers": None,
        "moe_router_topk": 2,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": None,
        "moe_token_dispatcher_type": "alltoall",
        "recompute_granularity": None,
        "fp8": None,
        "delay_wgrad_compute": False,
        "overlap_moe_expert_parallel_comm": False,
        "cuda_graph_impl": "none",
    }
    return SimpleNamespace(
        model=SimpleNamespace(**fields | model),
        optimizer=SimpleNamespace(optimizer="adam"),
        ddp=SimpleNamespace(use_megatron_fsdp=False),
        dist=SimpleNamespace(use_decentralized_pg=False, use_megatron_fsdp=False),
        rng=SimpleNamespace(seed=7),
        logger=SimpleNamespace(log_interval=5),
        checkpoint=SimpleNamespace(also_save_hf_checkpoint=False),
        mixed_precision=None,
        comm_overlap=None,
        peft=None,
        env_vars={},
    )


def changed(part: str, **fields: Any) -> SimpleNamespace:
    found = recipe()
    if part in ("mixed_precision", "comm_overlap", "peft"):
        setattr(found, part, SimpleNamespace(**fields))
    else:
        vars(getattr(found, part)).update(fields)
    return found


OVERLAP = {"overlap_moe_expert_parallel_comm": None, "delay_wgrad_compute": None}
REFUSED = {
    "groups": (changed("dist", use_decentralized_pg=True), "no FSEP group is created; set it to"),
    "files of Hugging Face": (
        changed("checkpoint", also_save_hf_checkpoint=True),
        "export from a checkpoint, or within",
    ),
    "dispatcher": (
        changed("model", moe_token_dispatcher_type="allgather"),
        "give --moe-token-disp",
    ),
    "one rank": (changed("model", expert_model_parallel_size=1), "-parallel-size 2 or more"),
    "dense": (changed("model", num_moe_experts=None), "there are no experts to shard"),
    "precision": (changed("mixed_precision", fp8="e4m3"), "--fp8-format e4m3"),
    "overlap": (
        changed("comm_overlap", **OVERLAP | {"delay_wgrad_compute": True}),
        "leave it out (it is speed-only)",
    ),
    "fsdp": (changed("ddp", use_megatron_fsdp=True), "--use-megatron-fsdp"),
    "optimizer": (changed("optimizer", optimizer="sophia"), "--optimizer sophia"),
    "graphs": (
        changed("model", cuda_graph_impl="transformer_engine", cuda_graph_scope="full"),
        "--cuda-graph-modules",
    ),
    "lora": (changed("peft", target_modules=["*.layers.0.*.linear_fc1"]), "LoRA on linear_fc1"),
    "lora by a pattern": (changed("peft", target_modules=["*linear_fc*"]), "LoRA on linear_fc1"),
}


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the launcher's variables, and undo other tests' changes of torch."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(command, "_replace_cuda_where_needed", lambda: None)
    monkeypatch.setattr(command, "go_offline_if_unreachable", lambda: False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(name: str) -> None:
    given, says = REFUSED[name]
    with pytest.raises(ValueError, match="cannot run this recipe") as refused:
        check_recipe(given, FSEPConfig())
    assert says in str(refused.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    given = changed("dist", use_decentralized_pg=True)
    given.model.delay_wgrad_compute = True
    with pytest.raises(ValueError, match=r"use_decentralized_pg[^\n]*\n *--delay-wgrad-compute"):
        check_recipe(given, FSEPConfig())


def test_sizes_are_checked_as_in_megatrons_training() -> None:
    with pytest.raises(ValueError, match=r"--fsep-capacity 1: the slots of"):
        check_recipe(recipe(), FSEPConfig(capacity=1))


@pytest.mark.parametrize(
    "given",
    [
        recipe(),
        changed("comm_overlap", **OVERLAP),
        changed("mixed_precision", fp8=None, bf16=True),
        changed("peft", target_modules=["linear_qkv", "*.self_attention.*"]),
    ],
    ids=["plain", "overlap", "precision", "lora on attention"],
)
def test_what_works_is_accepted(given: SimpleNamespace) -> None:
    check_recipe(given, FSEPConfig())


def test_a_recipe_is_read_as_bridge_applies_it_and_is_not_changed() -> None:
    given = recipe(delay_wgrad_compute=True)
    given.comm_overlap = SimpleNamespace(**OVERLAP)
    assert settings_of(given).delay_wgrad_compute is False
    assert given.model.delay_wgrad_compute is True


def test_fields_of_a_transformer_of_its_own_are_found() -> None:
    given = recipe()
    given.model = SimpleNamespace(transformer=given.model)
    assert settings_of(given).num_experts == 8


class Steps:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @contextlib.contextmanager
    def __call__(self, *step: Any) -> Iterator[StepOutcome]:
        outcome = StepOutcome()
        self.seen.append(("enters", *step))
        yield outcome
        self.seen.append(("leaves", outcome.weights_changed))


def test_the_callback_turns_fsep_on_and_marks_steps() -> None:
    steps = Steps()
    microbatches = mock.Mock(**{"get_num_microbatches.return_value": 2})
    given = recipe(deterministic_mode=True)
    context = SimpleNamespace(
        state=SimpleNamespace(train_state=SimpleNamespace(step=3), cfg=given),
        model=["chunk"],
        skipped_iter=False,
    )
    with (
        mock.patch.object(bridge, "enable") as enable,
        mock.patch.object(bridge, "training_step", steps),
        mock.patch.object(bridge, "install_metrics") as install,
        mock.patch.dict(sys.modules, {"megatron.core.num_microbatches_calculator": microbatches}),
    ):
        callback = FSEPCallback(given, FSEPConfig(capacity=4))
        callback.on_train_start(context)
        callback.on_train_step_start(context)
        callback.on_train_step_end(context)
        context.state.train_state.step, context.skipped_iter = 4, True
        callback.on_train_step_start(context)
        callback.on_train_step_end(context)
    enable.assert_called_once_with(FSEPConfig(capacity=4, late_plan=LatePlan.WAIT), seed=7)
    install.assert_called_once_with(5, 2, 0)
    assert steps.seen == [
        ("enters", 3, 2, ["chunk"]),
        ("leaves", True),
        ("enters", 4, 2, ["chunk"]),
        ("leaves", False),
    ]


def test_a_refused_recipe_turns_nothing_on() -> None:
    with mock.patch.object(bridge, "enable") as enable, pytest.raises(ValueError):
        FSEPCallback(changed("dist", use_decentralized_pg=True))
    enable.assert_not_called()


def failing() -> None:
    raise OSError("no such model")


RECIPES = {
    "fine": (recipe, 0, "runs; proved by row 'plain DDP' on the CPU"),
    "slow": (
        lambda: recipe(delay_wgrad_compute=True),
        3,
        "speed-only flags: --delay-wgrad-compute",
    ),
    "precise": (lambda: REFUSED["precision"][0], 4, "in bf16, without these flags: --fp8-format"),
    "alone": (lambda: REFUSED["one rank"][0], 5, "uses no expert parallelism"),
    "grouped": (lambda: REFUSED["groups"][0], 1, "no FSEP group is created"),
    "lora": (
        lambda: changed("peft", target_modules=["linear_qkv"]),
        0,
        "runs; proved by row 'LoRA on attention, distributed optimizer' on the CPU",
    ),
    "large": (
        lambda: recipe(
            num_moe_experts=4096,
            moe_token_dispatcher_type="flex",
            moe_flex_dispatcher_backend="deepep",
        ),
        1,
        "DeepEP takes at most 128",
    ),
    "failing": (failing, 2, "'failing' cannot be evaluated: OSError: no such model"),
    "mistaken": (dict, 2, "'mistaken': it returns dict, which has no model, dist, ddp"),
    ".relative:fine": (None, 2, "'.relative:fine': .relative cannot be imported"),
    "raising:fine": (None, 2, "raising cannot be imported (no such file); install"),
    "finer": (None, 2, "has none of this name; similar are fine"),
    "os:": (None, 2, "recipe 'os:': os has none of this name"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_judged_by_its_name(
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "raising.py").write_text('raise OSError("no such file")')
    monkeypatch.syspath_prepend(tmp_path)
    module = ModuleType("megatron.bridge.recipes")
    vars(module).update({key: made for key, (made, *_) in RECIPES.items() if made is not None})
    packages = {"megatron.bridge": ModuleType("megatron.bridge"), module.__name__: module}
    _, status, says = RECIPES[name]
    with mock.patch.dict(sys.modules, packages):
        assert cli.main(["check-recipe", "--bridge-recipe", name]) == status
    assert says in "".join(capsys.readouterr())


def noisy() -> None:
    """Warn on import before failing, as Megatron's modules do."""
    print("retrying in 8 s", file=sys.stderr)
    print("a model's docstring lacks a line")
    raise OSError("no such model")


def noisy_and_fine() -> SimpleNamespace:
    with contextlib.suppress(OSError):
        noisy()
    return recipe()


def judged(made: Any) -> int:
    module = ModuleType("megatron.bridge.recipes")
    vars(module)["made"] = made
    packages = {"megatron.bridge": ModuleType("megatron.bridge"), module.__name__: module}
    with mock.patch.dict(sys.modules, packages):
        return cli.main(["check-recipe", "--bridge-recipe", "made"])


def test_an_error_is_one_line_and_what_was_warned_of_is_shown_if_all_is_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert judged(noisy) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.endswith("cannot be evaluated: OSError: no such model\n")
    assert out == ""
    assert judged(noisy_and_fine) == 0
    out, err = capsys.readouterr()
    assert out.startswith("runs; ") and out.count("\n") == 1
    assert "retrying in 8 s" in err and "lacks a line" in err


def test_without_a_network_the_error_says_what_needs_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "go_offline_if_unreachable", lambda: True)
    assert judged(noisy) == 2
    said = capsys.readouterr().err
    assert "no such model (Hugging Face's server cannot be reached, or" in said
    assert "--bridge-csv" in said and said.count("\n") == 1
    assert judged(None) == 2
    assert "Hugging Face" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "environment", "is_told"),
    [
        (OSError("unreachable"), {}, True),
        (None, {}, False),
        (OSError("unreachable"), {"HF_HUB_OFFLINE": "0"}, False),
        (None, {"HF_HUB_OFFLINE": "1"}, True),
        (OSError("unreachable"), {"https_proxy": "http://proxy:3128"}, False),
        (OSError("unreachable"), {"HF_ENDPOINT": "http://[half"}, True),
    ],
    ids=["unreachable", "reachable", "never offline", "offline", "behind a proxy", "no address"],
)
def test_the_library_is_told_that_its_server_cannot_be_reached(
    error: OSError | None,
    environment: dict[str, str],
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect = mock.Mock(side_effect=error)
    monkeypatch.setattr(hugging_face.socket, "create_connection", connect)
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: name == "huggingface_hub")
    with mock.patch.dict(os.environ, environment, clear=True):
        assert hugging_face.go_offline_if_unreachable() is is_told
        assert os.environ.get("HF_HUB_OFFLINE") == (
            "1" if is_told else environment.get("HF_HUB_OFFLINE")
        )


def test_nobody_is_asked_where_the_library_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = mock.Mock(side_effect=OSError("unreachable"))
    monkeypatch.setattr(hugging_face.socket, "create_connection", connect)
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: None)
    assert not hugging_face.go_offline_if_unreachable()
    connect.assert_not_called()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_told_of_slow_imports(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert judged(recipe) == 0
    told = "importing Megatron-Bridge, which takes some seconds\n" if is_terminal else ""
    assert capsys.readouterr().err == told


def test_layers_to_offload_are_none_while_offloading_is_off() -> None:
    given = recipe(cpu_offloading=False, cpu_offloading_num_layers=95)
    check_recipe(given, FSEPConfig())
    given.model.cpu_offloading = True
    with pytest.raises(ValueError, match="--cpu-offloading-num-layers"):
        check_recipe(given, FSEPConfig())


def test_without_bridge_the_error_says_what_would_work(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(sys.modules, {"megatron.bridge": None}):
        assert cli.main(["check-recipe", "--bridge-recipe", "fine"]) == 2
    said = capsys.readouterr().err
    assert "megatron.bridge.recipes cannot be imported" in said and "YAML file" in said
    assert said.count("\n") == 1


def test_one_source_is_judged_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check-recipe", "--bridge-recipe", "fine", "--", "--num-experts", "8"]
    assert cli.main(words) == 2
    assert "give one of FILE, --bridge-recipe NAME" in capsys.readouterr().err
