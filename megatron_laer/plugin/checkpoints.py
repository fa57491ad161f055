"""Checkpoints carry the planner's state.

Megatron looks `save` and `load` up in the package at each call. A checkpoint counts once its
tracker file names it; that is written after `save` has returned, also under async save.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from megatron_laer import activation
from megatron_laer.plugin.patching import Patch
from megatron_laer.runtime import planner_checkpoint
from megatron_laer.runtime.coordinator import current_coordinator


def _storage() -> Any:
    """What checkpoints are written with: has `open` and `os`, of an object store where it is on."""
    from megatron.core import msc_utils

    if hasattr(msc_utils, "maybe_msc"):
        return msc_utils.maybe_msc
    # Megatron 0.18 decides at each place by itself.
    feature = msc_utils.MultiStorageClientFeature
    return feature.import_package() if feature.is_enabled() else SimpleNamespace(open=open, os=os)


def _with_planner_saved(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        planner_checkpoint.save_states(str(checkpoint_dir), current_coordinator(), _storage())
        return request

    return save


def _with_planner_loaded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        active = activation.active()
        if active is not None and active.config.plans:
            planner_checkpoint.load_states(str(checkpoint_dir), current_coordinator(), _storage())
        return loaded

    return load


CHECKPOINT_PATCHES = (
    Patch(
        "megatron.core.dist_checkpointing",
        "save",
        _with_planner_saved,
        "checkpoints carry the planner's state",
    ),
    Patch(
        "megatron.core.dist_checkpointing",
        "load",
        _with_planner_loaded,
        "a resumed run goes on planning",
    ),
)
