"""Judgement of Megatron-Bridge recipes, called by name, by their ConfigContainer."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from megatron_laer.config import FSEPConfig
from megatron_laer.files.checks import quoted
from megatron_laer.files.shipped import did_you_mean
from megatron_laer.integrations.bridge_config import settings_of
from megatron_laer.rules import IN_BRIDGE, REFUSALS, WITH_ADAPTERS, problems_by
from megatron_laer.support import arguments
from megatron_laer.tools.recipes.verdict import Judgement, Verdict, judge

_RECIPES = "megatron.bridge.recipes"
# Parts of a ConfigContainer that are read.
_PARTS = ("model", "dist", "ddp", "optimizer", "mixed_precision", "comm_overlap", "checkpoint")


# Parts that no supported Megatron can build, of recipes by `module:function`.
_NOT_BUILT = {
    # moe_n_hash_layers, dsv4_hybrid attention, enable_hyper_connections (deepseek_v4_bridge).
    r"\.deepseek_v4:": "hash routing, compressed sparse attention and hyper-connections of "
    "DeepSeek-V4: megatron-core 0.19 cannot build the model, and neither can 0.20.0 as developed; "
    "it takes the Megatron that Megatron-Bridge pins, until a release that FSEP supports has them"
}


def judge_container(name: str, recipe: Any) -> Judgement:
    """Judge a recipe's container; `name` is its function as `module:function`."""
    settings = settings_of(recipe)
    settings.world_size = settings.expert_model_parallel_size  # of the run, not of this process
    settings.is_lora = recipe.peft is not None
    refused = [*no_megatron_builds(name), *problems_by((*WITH_ADAPTERS, *IN_BRIDGE), settings)]
    judgement = judge(settings, also_refused=refused)
    if not judgement.runs:
        return judgement
    for row in REFUSALS:
        if row.flag in judgement.drop:
            setattr(settings, row.argument, row.accepted[0])
    # Check once more, now with the sizes that no row of the table knows.
    found = arguments.problems(settings, FSEPConfig(allow_unproven=judgement.allow))
    return Judgement(Verdict.REFUSED, None, tuple(found)) if found else judgement


def no_megatron_builds(name: str) -> list[str]:
    return [text for recipes, text in _NOT_BUILT.items() if re.search(recipes, name)]


def load_recipe(name: str) -> tuple[str, Any]:
    """Call a recipe's function; return `module:function` and its container.

    `name` is a function of `megatron.bridge.recipes`, or `module:function`, which may be any code
    but Python's own.
    """
    module, _, function = name.rpartition(":")
    module = module or _RECIPES
    full_name = f"{module}:{function}"
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"recipe {quoted(full_name)}: {module} is Python's own, and the function would be "
            "called; name a function that returns Megatron-Bridge's ConfigContainer"
        )
    try:
        found = importlib.import_module(module)
    except Exception as error:  # also errors of an imported file, or a name with a dot in front
        raise ValueError(
            f"recipe {quoted(full_name)}: {module} cannot be imported ({error}); install "
            "Megatron-Bridge with what it needs, or give Megatron's flags"
        ) from error
    recipe = getattr(found, function, None)
    if not callable(recipe):
        raise ValueError(
            f"recipe {quoted(full_name)}: {module} has none of this name"
            + did_you_mean(function, dir(found))
        )
    try:
        full_name, container = f"{recipe.__module__}:{recipe.__name__}", recipe()
    except Exception as error:  # code that is not ours may raise anything
        raise ValueError(
            f"recipe {quoted(name)} cannot be evaluated: {type(error).__name__}: {error}"
        ) from error
    if missing := [part for part in _PARTS if not hasattr(container, part)]:
        raise ValueError(
            f"recipe {quoted(name)}: it returns {type(container).__name__}, which has no "
            f"{', '.join(missing)}; name a function that returns Megatron-Bridge's ConfigContainer"
        )
    return full_name, container
