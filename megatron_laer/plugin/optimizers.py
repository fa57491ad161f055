"""Patches that make Lion update slices of experts, and refuse optimizers that need whole matrices.

Megatron gives the optimizers of its registry only matrices. Adam and SGD get every parameter and
need nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from megatron_laer import session
from megatron_laer.plugin.patching import Patch
from megatron_laer.rules import RULES, problems_by

_PACKAGE = "megatron.core.optimizer"


def check_installed(optimizer: str) -> None:
    """Raise ValueError for an optimizer whose package, emerging-optimizers, is missing."""
    from megatron.core.optimizer import HAVE_EMERGING_OPTIMIZERS

    if optimizer not in ("adam", "sgd") and not HAVE_EMERGING_OPTIMIZERS:
        raise ValueError(
            f"--optimizer {optimizer}: Megatron takes it from the package emerging-optimizers, and "
            "finds none of version 0.2 or newer; run pip install 'emerging-optimizers>=0.2', or "
            "give --optimizer adam or sgd"
        )


def _with_slices(original: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _entry(name, entry) for name, entry in original.items()}


def _entry(name: str, entry: Any) -> Any:
    if name != "lion":
        return replace(entry, config_to_kwargs=functools.partial(_judged, entry.config_to_kwargs))
    rules = {
        _without_slices(rule): override for rule, override in entry.default_param_overrides.items()
    }
    return replace(entry, default_param_overrides=rules)


def _judged(original: Callable[..., dict[str, Any]], config: Any, *rest: Any) -> Any:
    """Refuse, in loops without Megatron's arguments too, what the table of rules refuses."""
    current = session.current()
    assert current is not None
    is_shared = config.use_layer_wise_distributed_optimizer
    asked = {"fsep_sharding": current.sharding, "use_distributed_optimizer": is_shared}
    if problems := problems_by(RULES, SimpleNamespace(**vars(config) | asked)):
        raise ValueError(problems[0])
    return original(config, *rest)


def _without_slices(rule: Any) -> Any:
    """Exclude slices, which have 3 dimensions, from a rule for parameters that are no matrices."""
    from megatron_laer.layer.experts.slices import is_slice_of_matrices

    matches = rule.predicate.fn

    def fn(parameter: Any) -> bool:
        return not is_slice_of_matrices(parameter) and bool(matches(parameter))

    return replace(rule, predicate=replace(rule.predicate, fn=fn))


def _or_slices(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    from megatron_laer.layer.experts.slices import is_slice_of_matrices

    @functools.wraps(original)
    def is_managed_by_layer_wise_optimizer(param: Any) -> bool:
        return is_slice_of_matrices(param) or original(param)

    return is_managed_by_layer_wise_optimizer


OPTIMIZER_PATCHES = (
    Patch(
        _PACKAGE,
        "_EMERGING_OPTIMIZERS",
        _with_slices,
        "slices of experts go to the optimizer that stock's experts go to",
    ),
    Patch(
        f"{_PACKAGE}.emerging_optimizers",
        "_EMERGING_OPTIMIZERS",
        _with_slices,
        "Muon on rows is refused, and all others but Lion",
    ),
    Patch(
        f"{_PACKAGE}.layer_wise_optimizer",
        "is_managed_by_layer_wise_optimizer",
        _or_slices,
        "replicas share Lion's updates of slices",
    ),
)
