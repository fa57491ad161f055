"""`check-recipe --bridge-recipe` judges a recipe by its name, without Megatron-Bridge."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_laer.tools import cli
from megatron_laer.tools.cli import check_recipe as command
from tests.bridge_recipes import REFUSED, changed, recipe


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    """Hide the launcher's variables, and undo other tests' changes of torch."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(command, "replace_cuda_where_needed", lambda: None)


def failing() -> None:
    raise OSError("no such model")


RECIPES = {
    "fine": (recipe, 0, "runs; proved by row 'plain' on the CPU"),
    "slow": (lambda: recipe(moe_paged_stash=True), 3, "speed-only flags: --moe-paged-stash"),
    "precise": (
        lambda: recipe(fp8="e4m3", fp8_recipe="custom"),
        4,
        "in bf16, without these flags: --fp8-format",
    ),
    "alone": (lambda: REFUSED["one rank"][0], 5, "uses no expert parallelism"),
    "grouped": (lambda: REFUSED["groups"][0], 1, "no FSEP group is created"),
    "lora": (
        lambda: changed("peft", target_modules=["linear_qkv"]),
        0,
        "runs; proved by row 'lora' on the CPU",
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
    "finer": (None, 2, "has none of this name, did you mean fine?"),
    "os:system": (None, 2, "recipe 'os:system': os is Python's own, and the function would be"),
    "pytest:": (None, 2, "recipe 'pytest:': pytest has none of this name"),
}


def judged(name: str, made: Any) -> int:
    """Judge a recipe of a module that replaces Megatron-Bridge's."""
    module = ModuleType("megatron.bridge.recipes")
    vars(module).update({"fine": recipe} if made is None else {name: made})
    packages = {"megatron.bridge": ModuleType("megatron.bridge"), module.__name__: module}
    with mock.patch.dict(sys.modules, packages):
        return cli.main(["check-recipe", "--bridge-recipe", name])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_judged_by_its_name(name, capsys, monkeypatch, tmp_path):
    (tmp_path / "raising.py").write_text('raise OSError("no such file")')
    monkeypatch.syspath_prepend(tmp_path)
    made, status, says = RECIPES[name]
    assert judged(name, made) == status
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


def test_an_error_is_one_line_and_what_was_warned_of_is_shown_if_all_is_well(capsys):
    assert judged("made", noisy) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.endswith("cannot be evaluated: OSError: no such model\n")
    assert out == ""
    assert judged("made", noisy_and_fine) == 0
    out, err = capsys.readouterr()
    assert out.startswith("runs; ") and out.count("\n") == 1
    assert "retrying in 8 s" in err and "lacks a line" in err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_told_of_slow_imports(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert judged("made", recipe) == 0
    told = "importing Megatron-Bridge, which takes some seconds\n" if is_terminal else ""
    assert capsys.readouterr().err == told


def test_without_bridge_the_error_says_what_would_work(capsys):
    with mock.patch.dict(sys.modules, {"megatron.bridge": None}):
        assert cli.main(["check-recipe", "--bridge-recipe", "fine"]) == 2
    said = capsys.readouterr().err
    assert (
        "megatron.bridge.recipes cannot be imported" in said and "or give Megatron's flags" in said
    )
    assert said.count("\n") == 1
