"""Settings that do not go with experts in fp8 (`--fsep-allow-unproven fp8-experts`).

Those that FSEP refuses with any fp8 are rows of `table.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from megatron_laer.choices import Unproven

_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
_CHANGED = "scales may change between a restore or forward and its use"
_VIRTUAL = ("virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank")
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
    if recipe == "delayed":
        found += [
            f"{flag} {_WITH} --fp8-recipe delayed: {reason}; leave it out, or give "
            "--fp8-recipe tensorwise"
            for flag, reason in _not_with_delayed(settings)
        ]
    return found


def _not_with_delayed(settings: Any) -> Iterator[tuple[str, str]]:
    """Return what changes or multiplies the scales that a replica takes from its rank's homes."""

    def get(*names: str) -> Any:
        return next(filter(None, (getattr(settings, name, None) for name in names)), None)

    if get("tp_only_amax_red"):
        yield "tp_only_amax_red", "ranks then have scales of their own, and replicas other ones"
    if get("fp8_param_gather", "fp8_param"):
        yield "--fp8-param-gather", "the optimizer would find its scales, which no test has shown"
    if get("disable_parameter_transpose_cache"):
        yield "disable_parameter_transpose_cache", "weights are quantised again in each microbatch"
    granularity = get("recompute_granularity")
    if granularity == "full":
        yield "--recompute-granularity full", _CHANGED
    elif granularity == "selective" and "moe" in (get("recompute_modules") or ()):
        yield "--recompute-modules moe", _CHANGED
    if get("num_layers_per_virtual_pipeline_stage") or int(get(*_VIRTUAL) or 1) > 1:
        yield "a virtual pipeline", _CHANGED
    if get("mtp_num_layers"):
        yield "--mtp-num-layers", _CHANGED
    if getattr(settings, "fp8_wgrad", True) is False:
        yield "fp8_wgrad False", "replicas compute weights' gradients in fp8"
    if get("overlap_moe_expert_parallel_comm"):
        yield "--overlap-moe-expert-parallel-comm", _CHANGED
    if get("delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"):
        yield "--delay-wgrad-compute", _CHANGED
    if get("cuda_graph_impl") not in (None, "none"):
        yield "--cuda-graph-impl", "graphs have scales of their own"
    if get("hybrid_layer_pattern", "hybrid_override_pattern"):
        yield "--hybrid-layer-pattern", "a MoE layer may be first, after which scales change"
