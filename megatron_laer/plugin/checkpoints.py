"""Patches that add the planner's state to checkpoints, and mark optimizer state only FSEP can read.

Megatron looks up `save` and `load` in the package at each call. A checkpoint is valid once its
tracker file names it; that is written after `save` has returned, also under async save.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_laer import session
from megatron_laer.choices import Sharding
from megatron_laer.files.checks import quoted
from megatron_laer.planner.home_order import home_digest
from megatron_laer.plugin.patching import around
from megatron_laer.releases import CHECKPOINT_STORAGE
from megatron_laer.support import RefusedError


def _storage() -> Any:
    """Return the object whose `open` and `os` write checkpoints, to files or an object store."""
    from megatron.core import msc_utils

    if CHECKPOINT_STORAGE.is_in(msc_utils):
        return msc_utils.maybe_msc
    # Older releases of Megatron decide this at each call.
    feature = msc_utils.MultiStorageClientFeature
    return feature.import_package() if feature.is_enabled() else SimpleNamespace(open=open, os=os)


# Buffers of Megatron's distributed optimizer in its memory layout, `dp_reshardable`.
_BUFFERS = re.compile(r"(?:^|\.)optimizer\.distributed\.dp_group_idx_\d+\.")
_MARK = ".fsep-"
_loads_shards = ContextVar("loads_shards", default=False)


def sharding_of_checkpoint(args: Namespace) -> Sharding | None:
    """Return the sharding of the run that this one goes on from; None if it begins anew.

    Stock's experts are at home. Reads a checkpoint in `torch_dist`, and no tensor.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    if args.finetune or not checkpointing.checkpoint_exists(args.load):
        return None
    folder = checkpointing.get_load_checkpoint_path_by_args(args)
    if not dist_checkpointing.check_is_distributed_checkpoint(folder):
        return None
    saved = dist_checkpointing.load_common_state_dict(folder).get("args")
    has_rows = getattr(saved, "fsep_sharding", None) == Sharding.ROWS
    return Sharding.ROWS if has_rows else Sharding.EXPERTS


def _mark_buffers(sharded_state_dict: Any) -> None:
    """Mark the optimizer's buffers with FSEP's group size or homes.

    A rank's slices of all experts have as many elements as stock's whole experts. Without the mark,
    one kind would silently be read into the other. Buffers of experts in stock's homes, and of a
    stage without experts, are stock's.
    """
    coordinator = session.current_coordinator()
    if coordinator is None:
        return
    of_run = str(coordinator.groups.size)
    if coordinator.geometry.sharding == Sharding.EXPERTS:
        homes = home_digest(coordinator.layouts.homes)
        if not homes:
            return
        of_run = f"homes-{homes}"
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    mark = f"{_MARK}{of_run}"
    buffers = [
        entry
        for entry in nested_values(sharded_state_dict)
        if isinstance(entry, ShardedBase) and _BUFFERS.search(entry.key)
    ]
    for entry in buffers:
        if not entry.key.endswith(mark):
            entry.key += mark


@around(
    "megatron.core.dist_checkpointing",
    "save",
    "checkpoints carry the planner's state, and optimizer buffers of FSEP say so",
)
def _save(
    original: Any, sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kw: Any
) -> Any:
    _mark_buffers(sharded_state_dict)
    request = original(sharded_state_dict, checkpoint_dir, *args, **kw)
    _save_planner(checkpoint_dir)
    return request


@around(
    "megatron.core.dist_checkpointing",
    "load",
    "a resumed run goes on planning, and reads no optimizer buffers of another kind",
)
def _load(
    original: Any, sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kw: Any
) -> Any:
    _mark_buffers(sharded_state_dict)
    try:
        loaded = original(sharded_state_dict, checkpoint_dir, *args, **kw)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        current = session.current()
        if _MARK not in str(error) or current is None:
            raise
        # Its own text is of the buffers' keys, thousands of characters from each rank.
        raise RefusedError(
            f"{checkpoint_dir}: its optimizer state, in Megatron's form dp_reshardable, is "
            f"of a run with another --fsep-sharding than {current.sharding}, another "
            f"--expert-model-parallel-size than {current.groups.size} or other "
            "--fsep-homes; give that run's, save with --dist-ckpt-optim-fully-reshardable, "
            "or load with --no-load-optim"
        ) from None
    _resume_planner(checkpoint_dir, loaded)
    return loaded


@around(
    "megatron.training.checkpointing",
    "preprocess_fsdp_dtensor_state_dict",
    "checkpoints of Megatron-FSDP carry the planner's state",
)
def _save_before_shards(original: Any, args: Any, state_dict: Any, model: Any) -> Any:
    """Save the planner's state before the shards of Megatron-FSDP, which torch alone writes."""
    from megatron.training import checkpointing

    if not _loads_shards.get():
        step = state_dict["iteration"]
        _save_planner(checkpointing.get_checkpoint_name(args.save, step, return_base_dir=True))
    return original(args, state_dict, model)


@around(
    "megatron.training.checkpointing",
    "_load_base_checkpoint",
    "a run that resumes from Megatron-FSDP's shards goes on planning",
)
def _load_with_shards(original: Any, *args: Any, **kwargs: Any) -> Any:
    token = _loads_shards.set(True)
    try:
        result = original(*args, **kwargs)
    finally:
        _loads_shards.reset(token)
    loaded, directory, _, kind = result
    current = session.current()
    homes = None if current is None else current.config.homes
    if homes is not None and getattr(kind, "name", "") in ("LEGACY", "LOCAL"):
        raise ValueError(
            f"{directory}: experts of this checkpoint are saved by rank, not by number, so "
            f"--fsep-homes {quoted(homes)} would mix them up; load it without, and save it "
            "with --ckpt-format torch_dist"
        )
    # At first rank 0 alone reads the run's arguments.
    if not kwargs.get("rank0") and getattr(kind, "name", "") == "FSDP_DTENSOR":
        _resume_planner(directory, loaded)
    return result


def _save_planner(directory: Any) -> None:
    if (coordinator := session.current_coordinator()) is not None:
        coordinator.layouts.save(str(directory), _storage())


def _resume_planner(directory: Any, loaded: Any) -> None:
    found = session.current_coordinator()
    if found is not None and found.config.makes_plans and found.layers and not found.in_steps:
        saved = loaded.get("args") if isinstance(loaded, dict) else None
        found.layouts.resume(str(directory), _storage(), getattr(saved, "fsep_run", None))


CHECKPOINT_PATCHES = (_save, _load, _save_before_shards, _load_with_shards)
