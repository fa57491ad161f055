"""Settings and cards that do not go with experts in fp8 (`--fsep-allow-unproven fp8-experts`).

Those that FSEP refuses with any fp8 are rows of `table.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from megatron_laer.choices import Unproven
from megatron_laer.files.checks import quoted


class _Card(NamedTuple):
    """Compute capabilities, `first` to below `end`, and the release of CUDA that a recipe needs."""

    first: tuple[int, int]
    end: tuple[int, int] = (10**9, 0)
    cuda: tuple[int, int] = (0, 0)

    def takes(self, capability: tuple[int, int], cuda: tuple[int, int]) -> bool:
        return self.first <= capability < self.end and self.cuda <= cuda

    def __str__(self) -> str:
        below = f" to below {_dotted(self.end)}" if self.end[0] < 10**9 else " or higher"
        cuda = f" and CUDA {_dotted(self.cuda)}" if self.cuda > (0, 0) else ""
        return f"compute capability {_dotted(self.first)}{below}{cuda}"


# Megatron's default, which experts do not take.
MEGATRONS_RECIPE = "delayed"
# Recipes, and Transformer Engine's own checks of cards for them (releases 2.11 to 2.20).
_RECIPES = {
    "tensorwise": _Card((8, 9)),
    "blockwise": _Card((9, 0), cuda=(12, 9)),
    "mxfp8": _Card((10, 0), (12, 0)),
}
_WITH = f"with --fsep-allow-unproven {Unproven.FP8_EXPERTS}"


def problems(settings: Any, allowed: Collection[Unproven], kept_gib: float = 0.0) -> list[str]:
    """Return the settings with which experts cannot compute in fp8.

    `settings` is Megatron's TransformerConfig or its arguments, `kept_gib` FSEP's
    `restore_memory_gib`.
    """
    if Unproven.FP8_EXPERTS not in allowed or not getattr(settings, "fp8", None):
        return []
    recipe = recipe_of(settings)
    problem = recipe_problem(recipe)
    found = [] if problem is None else [problem]
    # A field of Megatron's DDP, not of its TransformerConfig.
    reuses = getattr(settings, "reuse_grad_buf_for_mxfp8_param_ag", True)
    if recipe == "mxfp8" and getattr(settings, "fp8_param_gather", False) and not reuses:
        found.append(
            f"--fp8-param-gather {_WITH} --fp8-recipe mxfp8: Transformer Engine does not move such "
            "parameters into Megatron's buffers; give --reuse-grad-buf-for-mxfp8-param-ag"
        )
    if recipe == "mxfp8" and kept_gib:
        found.append(
            f"--fsep-restore-memory-gib {kept_gib} {_WITH} --fp8-recipe mxfp8: keeps restored "
            "experts for backward, which multiplies by others, quantised by columns; leave it out"
        )
    return found


def recipe_problem(recipe: str) -> str | None:
    """Return why experts cannot compute by a recipe; None if they can."""
    if recipe in _RECIPES:
        return None
    default = ", Megatron's default," if recipe == MEGATRONS_RECIPE else ""
    return (
        f"--fp8-recipe {quoted(recipe)}{default} {_WITH}: replicas of experts know the scales of "
        "other recipes; give --fp8-recipe tensorwise (current scaling), blockwise or mxfp8"
    )


def recipe_of(settings: Any) -> str:
    """Return the recipe; settings of recipes and job scripts may lack Megatron's default."""
    recipe = getattr(settings, "fp8_recipe", None) or MEGATRONS_RECIPE
    return str(getattr(recipe, "value", recipe))


def card_problem(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    """Return why Transformer Engine computes no products of the recipe on a card; None if it does.

    `cuda` is the release that torch was built with, None where it is not known.
    """
    major, minor = map(int, (cuda or "99.0").split(".")[:2])
    fitting = [name for name, card in _RECIPES.items() if card.takes(capability, (major, minor))]
    if recipe in fitting:
        return None
    instead = f"give --fp8-recipe {' or '.join(fitting)}" if fitting else "leave out --fp8-format"
    return (
        f"--fp8-recipe {recipe} {_WITH}: Transformer Engine needs {_RECIPES[recipe]}, and this "
        f"card has {_dotted(capability)} with CUDA {cuda}; {instead}"
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
