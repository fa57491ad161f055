"""Settings and cards that do not go with experts in fp8 (`--fsep-allow-unproven fp8-experts`).

Those that FSEP refuses with any fp8 are rows of `table.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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


DELAYED = "delayed"
# Recipes, and Transformer Engine's own checks of cards for them (releases 2.11 to 2.20).
_RECIPES = {
    "tensorwise": _Card((8, 9)),
    "blockwise": _Card((9, 0), cuda=(12, 9)),
    "mxfp8": _Card((10, 0), (12, 0)),
    DELAYED: _Card((8, 9)),
}
_WITH = f"with --fsep-allow-unproven {Unproven.FP8_EXPERTS}"
_WITH_DELAYED = f"{_WITH} --fp8-recipe {DELAYED}"
# Replicas would compute before homes, so that in backward homes' scales change first.
NEEDS_INPUT_GRADIENT = (
    f"--fp8-recipe {DELAYED} {_WITH}: the experts' input needs no gradient, so replicas would "
    "quantise gradients by newer scales than homes; train something before the experts, or give "
    "--fp8-recipe tensorwise"
)


def problems(
    settings: Any,
    allowed: Collection[Unproven],
    kept_gib: float = 0.0,
    homes: str | None = None,
) -> list[str]:
    """Return the settings with which experts cannot compute in fp8.

    `settings` is Megatron's TransformerConfig or its arguments, `kept_gib` and `homes`
    FSEP's `restore_memory_gib` and `homes`.
    """
    if Unproven.FP8_EXPERTS not in allowed or not getattr(settings, "fp8", None):
        return []
    found, recipe = [], recipe_of(settings)
    if recipe not in _RECIPES:
        found.append(
            f"--fp8-recipe {recipe} {_WITH}: replicas of experts know the scales of other recipes; "
            f"give --fp8-recipe {' or '.join(_RECIPES)}"
        )
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
    if recipe == DELAYED:
        found += [
            f"{flag} {_WITH_DELAYED}: {reason}; leave it out, or give --fp8-recipe tensorwise"
            for flag, reason in _not_with_delayed(settings, homes)
        ]
    return found


def _not_with_delayed(settings: Any, homes: str | None) -> Iterator[tuple[str, str]]:
    """Return what changes or multiplies the scales that a replica takes from its rank's homes."""

    def get(name: str) -> Any:
        return getattr(settings, name, None)

    if homes is not None:
        yield (
            f"--fsep-homes {quoted(homes)}",
            "experts of one number on their ranks share scales, and other homes share other ones",
        )
    # Two fields without a flag.
    if get("tp_only_amax_red"):
        yield (
            "tp_only_amax_red=True",
            "ranks then have scales of their own, and replicas other ones",
        )
    if get("disable_parameter_transpose_cache"):
        yield (
            "disable_parameter_transpose_cache=True",
            "weights are quantised again in each microbatch",
        )
    if get("fp8_wgrad") is False:
        yield "--no-fp8-wgrad", "replicas compute weights' gradients in fp8"
    for name in ("delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"):
        if get(name):
            yield _flag(name), "replicas would quantise gradients again, by newer scales"
    if get("cuda_graph_impl") not in (None, "none"):
        yield "--cuda-graph-impl", "graphs have scales of their own"
    if get("mtp_use_repeated_layer") and (get("mtp_num_layers") or 0) > 1 and _reruns(settings):
        yield (
            "--mtp-use-repeated-layer and recompute",
            "re-runs would have the scales of the layer's other passes",
        )
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        if get(name):
            yield _flag(name), "no test has shown it"


def _reruns(settings: Any) -> bool:
    """Return whether experts' linear layers run again for backward."""
    granularity = getattr(settings, "recompute_granularity", None)
    modules = getattr(settings, "recompute_modules", None) or ()
    return granularity == "full" or (granularity == "selective" and "moe" in modules)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def resume_problem(saved: Any, num_ranks: int) -> str | None:
    """Return why experts with delayed scaling cannot go on from a run with these arguments."""
    before = getattr(saved, "expert_model_parallel_size", num_ranks)
    if before == num_ranks or not getattr(saved, "fp8", None) or recipe_of(saved) != DELAYED:
        return None
    return (
        f"--expert-model-parallel-size {num_ranks} {_WITH_DELAYED}: the checkpoint has scales by "
        f"number of {before} ranks, and other experts share them; give "
        f"--expert-model-parallel-size {before} or --fp8-recipe tensorwise"
    )


def recipe_of(settings: Any) -> str:
    """Return the recipe; settings of recipes and job scripts may lack Megatron's default."""
    recipe = getattr(settings, "fp8_recipe", None) or DELAYED
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
