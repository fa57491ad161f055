"""Megatron-Bridge's ConfigContainer is read here as the arguments of Megatron that it amounts to.

A recipe is read as its function returns it: what Megatron-Bridge applies to the model when it
starts, precision and communication, is applied to what is read, and the container is not changed.
"""

from __future__ import annotations

import importlib
import os
from argparse import Namespace
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import quoted
from megatron_laer.recipes.families import LORA_ON_EXPERTS, implied_by
from megatron_laer.recipes.verdict import Judgement, Verdict, judge
from megatron_laer.support import arguments
from megatron_laer.support.refusal import names_of
from megatron_laer.support.table import REFUSALS

_RECIPES = "megatron.bridge.recipes"
_DECENTRALIZED = (
    "dist.use_decentralized_pg=True: Megatron-Bridge then makes its process groups without "
    "Megatron's parallel state, so that no FSEP group is created; set it to False"
)
_SAVES_HUGGING_FACE = (
    "checkpoint.also_save_hf_checkpoint=True: Megatron-Bridge then reads experts by stock's names, "
    "which an FSEP model has not while it trains; set it to False, and export from a checkpoint, "
    "or within megatron_laer.integrations.bridge_weights.stock_weights()"
)
_OVERLAPS = ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute")
_EXPERTS_LINEAR = ("linear_fc1", "linear_fc2")
# What is read of a ConfigContainer.
_PARTS = ("model", "dist", "ddp", "optimizer", "mixed_precision", "comm_overlap", "checkpoint")


class EvaluationError(ValueError):
    """A recipe's function was called, and failed."""


def settings_of(recipe: Any) -> Namespace:
    """Return Megatron's arguments, by the names that the table of refusals knows them by."""
    model = recipe.model
    found: dict[str, Any] = {"num_moe_experts": None, "expert_model_parallel_size": 1}
    # Of newer models the fields of TransformerConfig are in a part of their own.
    for part in (recipe.dist, recipe.ddp, recipe.optimizer, getattr(model, "transformer", model)):
        found |= vars(part)
    found |= vars(model)
    found |= {name: value for name, value in vars(_precision(recipe)).items() if name in found}
    if recipe.comm_overlap is not None:
        # Megatron-Bridge takes these from here alone, and what nobody set for off.
        found |= {name: bool(getattr(recipe.comm_overlap, name)) for name in _OVERLAPS}
    found["cuda_graph_modules"] = _graphed(
        found.get("cuda_graph_modules") or found.get("cuda_graph_scope")
    )
    found["use_megatron_fsdp"] = any(
        getattr(part, "use_megatron_fsdp", False) for part in (recipe.dist, recipe.ddp)
    )
    for row in REFUSALS:
        if row.argument and row.field in found:
            found[row.argument] = found.get(row.argument) or found[row.field]
    if not found.get("cpu_offloading", True):  # the number of layers alone offloads nothing
        found["cpu_offloading_num_layers"] = 0
    found["num_experts"] = found["num_moe_experts"]
    found["rank"] = int(os.environ.get("RANK", "0"))
    # A launcher may say it by another name; Megatron-Bridge then checks it.
    found["world_size"] = int(os.environ.get("WORLD_SIZE", found["expert_model_parallel_size"]))
    return Namespace(**found)


def problems_of(recipe: Any) -> list[str]:
    """List what FSEP cannot run with in settings that Megatron has no argument for."""
    found = [_DECENTRALIZED] if recipe.dist.use_decentralized_pg else []
    # Only newer releases can.
    if getattr(recipe.checkpoint, "also_save_hf_checkpoint", False):
        found.append(_SAVES_HUGGING_FACE)
    return found + ([LORA_ON_EXPERTS] if _adapts_experts(recipe) else [])


def judge_container(name: str, recipe: Any) -> Judgement:
    """Judge a recipe by its container.

    Args:
        name: of its function, as `module:function`.
        recipe: what the function returned.
    """
    refused = [row.refused for row in implied_by(name) if row.refused]
    settings = settings_of(recipe)
    settings.world_size = settings.expert_model_parallel_size  # of the run, not of this process
    settings.is_lora = recipe.peft is not None
    judgement = judge(settings, also_refused=[*refused, *problems_of(recipe)])
    if not judgement.runs:
        return judgement
    for row in REFUSALS:
        if row.flag in judgement.drop:
            setattr(settings, row.argument, row.accepted[0])
    # Once more, and now with the sizes that no row of the table knows.
    found = arguments.problems(settings, FSEPConfig())
    return Judgement(Verdict.REFUSED, None, tuple(found)) if found else judgement


def load_recipe(name: str) -> tuple[str, Any]:
    """Call a recipe's function; returns `module:function` and its container.

    Args:
        name: of a function of `megatron.bridge.recipes`, or `module:function`.

    Raises:
        ValueError: Megatron-Bridge cannot be imported, or has no such recipe, or the recipe fails
            or returns something else.
    """
    module, _, function = name.rpartition(":")
    recipe = _function(module or _RECIPES, function)
    try:
        full_name, container = f"{recipe.__module__}:{recipe.__name__}", recipe()
    except Exception as error:  # whatever it is, from code that is not ours
        raise EvaluationError(
            f"recipe {quoted(name)} cannot be evaluated: {type(error).__name__}: {error}"
        ) from error
    if missing := [part for part in _PARTS if not hasattr(container, part)]:
        raise ValueError(
            f"recipe {quoted(name)}: it returns {type(container).__name__}, which has no "
            f"{', '.join(missing)}; name a function that returns Megatron-Bridge's ConfigContainer"
        )
    return full_name, container


def _function(module: str, name: str) -> Callable[[], Any]:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # also what an imported file raises, or a name with a dot in front
        raise ValueError(
            f"recipe {quoted(f'{module}:{name}')}: {module} cannot be imported ({error}); install "
            "Megatron-Bridge with what it needs, or give the recipe's fields in a YAML file"
        ) from error
    recipe: Callable[[], Any] | None = getattr(found, name, None)
    if not callable(recipe):
        similar = get_close_matches(name, dir(found))
        raise ValueError(
            f"recipe {quoted(f'{module}:{name}')}: {module} has none of this name"
            + (f"; similar are {', '.join(similar)}" if similar else "")
        )
    return recipe


def _precision(recipe: Any) -> Any:
    given = recipe.mixed_precision
    if isinstance(given, str):
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        return get_mixed_precision_config(given)
    return given or Namespace()


def _graphed(given: Any) -> list[str]:
    """Return the modules that a graph captures; none are listed for whole layers."""
    words = given.split(",") if isinstance(given, str) else names_of(given or ())
    return [word for word in words if word != "full"]


def _adapts_experts(recipe: Any) -> bool:
    targets = getattr(recipe.peft, "target_modules", None) or ()
    names = {target.split(".")[-1] for target in targets} - {"*"}  # of whatever comes before
    return any(fnmatchcase(linear, name) for linear in _EXPERTS_LINEAR for name in names)
