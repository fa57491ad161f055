"""Settings that do not go with experts in fp8 (`--fsep-allow-unproven fp8-experts`).

Those that FSEP refuses with any fp8 are rows of `table.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_laer.choices import Unproven

_RECIPES = ("tensorwise", "blockwise", "mxfp8")
_WITH = f"with --fsep-allow-unproven {Unproven.FP8_EXPERTS}"


def problems(settings: Any, allowed: Collection[Unproven]) -> list[str]:
    """Return the settings with which experts cannot compute in fp8.

    `settings` is Megatron's TransformerConfig or its arguments.
    """
    if Unproven.FP8_EXPERTS not in allowed or not getattr(settings, "fp8", None):
        return []
    found = []
    # Settings of recipes and job scripts lack some; this is Megatron's default.
    recipe = getattr(settings, "fp8_recipe", None) or "delayed"
    recipe = getattr(recipe, "value", recipe)
    if recipe not in _RECIPES:
        found.append(
            f"--fp8-recipe {recipe} {_WITH}: replicas of experts know the scales of other recipes; "
            f"give --fp8-recipe {' or '.join(_RECIPES)}"
        )
    names = ("fp8_param_gather", "fp8_param")  # of the argument and of the field
    if recipe == "mxfp8" and any(getattr(settings, name, False) for name in names):
        found.append(
            f"--fp8-param-gather {_WITH} --fp8-recipe mxfp8: such parameters are kept in both "
            "directions, which no test has shown; leave it out"
        )
    return found
