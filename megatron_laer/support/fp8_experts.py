"""Settings and cards that do not go with experts in fp8 (`--fsep-allow-unproven fp8-experts`).

Those that FSEP refuses with any fp8 are rows of rules.toml.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_laer.choices import Unproven
from megatron_laer.files.checks import quoted
from megatron_laer.precision import MEGATRONS_RECIPE, QUANTISED, Precision, dotted, recipe_of

_WITH = f"with --fsep-allow-unproven {Unproven.FP8_EXPERTS}"


def problems(settings: Any, allowed: Collection[Unproven], kept_gib: float = 0.0) -> list[str]:
    """Return the settings with which experts cannot compute in fp8.

    `settings` is Megatron's TransformerConfig or its arguments, `kept_gib` FSEP's
    `restore_memory_gib`.
    """
    if Unproven.FP8_EXPERTS not in allowed or not getattr(settings, "fp8", None):
        return []
    recipe = recipe_of(settings)
    if (problem := recipe_problem(recipe)) is not None:
        return [problem]
    row, found = Precision(recipe).row, []
    # A field of Megatron's DDP, not of its TransformerConfig.
    reuses = getattr(settings, "reuse_grad_buf_for_mxfp8_param_ag", True)
    if not row.in_buffers and getattr(settings, "fp8_param_gather", False) and not reuses:
        found.append(
            f"--fp8-param-gather {_WITH} --fp8-recipe {recipe}: Transformer Engine does not move "
            "such parameters into Megatron's buffers; give --reuse-grad-buf-for-mxfp8-param-ag"
        )
    if row.directions > 1 and kept_gib:
        found.append(
            f"--fsep-restore {kept_gib} {_WITH} --fp8-recipe {recipe}: keeps restored "
            "experts for backward, which multiplies by others, quantised by columns; leave it out"
        )
    return found


def recipe_problem(recipe: str) -> str | None:
    """Return why experts cannot compute by a recipe; None if they can."""
    if recipe in QUANTISED:
        return None
    default = ", Megatron's default," if recipe == MEGATRONS_RECIPE else ""
    return (
        f"--fp8-recipe {quoted(recipe)}{default} {_WITH}: replicas of experts know the scales of "
        "other recipes; give --fp8-recipe tensorwise (current scaling), blockwise or mxfp8"
    )


def card_problem(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    """Return why Transformer Engine computes no products of the recipe on a card; None if it does.

    `cuda` is the release that torch was built with, None where it is not known.
    """
    major, minor = map(int, (cuda or "99.0").split(".")[:2])
    fitting = [one for one in QUANTISED if one.row.cards.include(capability, (major, minor))]
    if recipe in fitting:
        return None
    instead = f"give --fp8-recipe {' or '.join(fitting)}" if fitting else "leave out --fp8-format"
    return (
        f"--fp8-recipe {recipe} {_WITH}: Transformer Engine needs "
        f"{Precision(recipe).row.cards}, and this card has {dotted(capability)} with CUDA "
        f"{cuda}; {instead}"
    )
