"""Patches that make Muon and Lion update slices of experts.

Megatron gives these optimizers only matrices; others of its registry are refused. Adam and SGD get
every parameter and need nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megatron_laer import session
from megatron_laer.layer.experts.whole_matrix import whole_matrix_of
from megatron_laer.plugin.patching import Patch
from megatron_laer.runtime.comm.collectives import raise_everywhere

_PACKAGE = "megatron.core.optimizer"
_DISTRIBUTED = "--optimizer muon with --use-distributed-optimizer (or dist_muon)"


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
    from megatron_laer.layer.experts.muon import ExpertMuon

    if name not in ("muon", "lion"):
        return replace(entry, config_to_kwargs=functools.partial(_refuse, name))
    rules = {
        _without_slices(rule): override for rule, override in entry.default_param_overrides.items()
    }
    entry = replace(entry, default_param_overrides=rules)
    if name == "lion":
        return entry
    options = functools.partial(_muon_options, entry.config_to_kwargs)
    return replace(entry, optimizer_cls=ExpertMuon, config_to_kwargs=options)


def _refuse(name: str, *_: Any) -> Any:
    raise ValueError(
        f"optimizer={name!r}: it needs whole matrices, and a rank holds rows of them, for which "
        "FSEP provides with 'muon' alone; use 'adam', 'sgd', 'lion' or 'muon'"
    )


def _without_slices(rule: Any) -> Any:
    """Exclude slices, which have 3 dimensions, from a rule for parameters that are no matrices."""
    matches = rule.predicate.fn

    def fn(parameter: Any) -> bool:
        return whole_matrix_of(parameter) is None and bool(matches(parameter))

    return replace(rule, predicate=replace(rule.predicate, fn=fn))


def _muon_options(
    original: Callable[..., dict[str, Any]], config: Any, model_chunks: Any, pg_collection: Any
) -> dict[str, Any]:
    current = session.current()
    assert current is not None
    if config.use_layer_wise_distributed_optimizer or config.optimizer.startswith("dist_"):
        raise_everywhere(
            _problem_of_dtype(config)
            or _problem_of_replicas(model_chunks, pg_collection, current.groups.size)
        )
    options = original(config, model_chunks, pg_collection)
    return {**options, "fsep_group": current.groups.gradients}


def _problem_of_dtype(config: Any) -> str | None:
    if config.bf16:
        return None
    return (
        f"{_DISTRIBUTED} without --bf16: Megatron's layer-wise optimizer cannot step in fp32; give "
        "--bf16, or leave out --use-distributed-optimizer"
    )


def _problem_of_replicas(model_chunks: Any, pg_collection: Any, num_ranks: int) -> str | None:
    """Return why replicas cannot share the update of this model's slices; None if they can.

    Each rank divides its own parameters among replicas by their sizes.
    """
    slices = (whole_matrix_of(p) for chunk in model_chunks for p in chunk.parameters())
    uneven = sorted({whole.rows for whole in slices if whole and whole.rows % num_ranks})
    if pg_collection.expt_dp.size() == 1 or not uneven:
        return None
    return (
        f"{_DISTRIBUTED}: {uneven} rows of experts' matrices on "
        f"--expert-model-parallel-size {num_ranks} make slices of two sizes, by which replicas "
        "would share the work differently on different ranks; leave out "
        "--use-distributed-optimizer, or choose an --expert-model-parallel-size that divides them"
    )


def _or_slices(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @functools.wraps(original)
    def is_managed_by_layer_wise_optimizer(param: Any) -> bool:
        return whole_matrix_of(param) is not None or original(param)

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
        "Muon orthogonalises experts whole",
    ),
    Patch(
        f"{_PACKAGE}.layer_wise_optimizer",
        "is_managed_by_layer_wise_optimizer",
        _or_slices,
        "replicas share Muon's and Lion's updates of slices",
    ),
)
