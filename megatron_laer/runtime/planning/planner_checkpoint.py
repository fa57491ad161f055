"""Planner states in a checkpoint's directory, one small file per FSEP group.

`planner/state.py` defines a state and its bytes. Megatron deletes the files with the checkpoint. No
error here stops a run: planning then restarts from the static layout.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_laer.arrays import Int64
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.state import STATE, PlannerState
from megatron_laer.runtime.comm.collectives import broadcast_bytes
from megatron_laer.runtime.comm.process_groups import FSEPGroups

logger = logging.getLogger(__name__)

FOLDER = "fsep_planner"

# Far above the 0.2 GB of 128 layers with 512 experts on 256 ranks.
_MAX_FILE_BYTES = 2**32


def state_path(directory: str, group_index: int) -> str:
    # Not a path, since a storage may have other names than a file system.
    return f"{directory}/{FOLDER}/{STATE.path('', group_index)}"


@dataclass(frozen=True)
class Resumption:
    """State of an earlier run's planner, the same on all ranks of an FSEP group.

    Without a state, planning starts from the static layout; `problem` is the reason, if one was
    expected.
    """

    state: PlannerState | None = None
    problem: str | None = None


def save_state(
    directory: str, groups: FSEPGroups, make_state: Callable[[], PlannerState | None], storage: Any
) -> None:
    """Write this group's state on its rank 0, to a `storage` like Megatron's `maybe_msc`."""
    if groups.rank != 0:
        return
    path = state_path(directory, groups.index)
    try:
        state = make_state()
        if state is None:
            return
        storage.os.makedirs(os.path.dirname(path), exist_ok=True)
        with storage.open(path, "wb") as file:
            file.write(state.to_bytes())
    except Exception as error:  # the other ranks wait for this one, and the weights are saved
        with contextlib.suppress(Exception):
            storage.os.remove(path)
        logger.warning(
            "FSEP: the planner's state is not in the checkpoint; a run that resumes from it plans "
            "anew: %s: %r",
            path,
            error,
        )


def load_state(
    directory: str,
    groups: FSEPGroups,
    device: torch.device,
    adapt: Callable[[PlannerState], PlannerState],
    storage: Any,
) -> Resumption:
    """Read this group's state on rank 0 and broadcast it. Collective over the group.

    `adapt` returns the state for this run's homes, and raises ValueError for another model's.
    """
    path = state_path(directory, groups.index)
    data, problem = b"", f"there is no planner's state {path}"
    if groups.rank == 0:
        try:
            data = _read_state(path, storage)
        except FileNotFoundError:
            pass
        except Exception as error:  # the others wait for rank 0
            problem = f"{path} cannot be read: {error!r}"
    data = broadcast_bytes(data, groups, device)
    if not data:
        return Resumption(problem=problem)
    try:
        state = adapt(PlannerState.from_bytes(data))
    except ValueError as error:
        return Resumption(problem=f"{path}: {error}")
    return Resumption(state)


def by_expert(state: PlannerState, homes: Sequence[HomeOrder]) -> PlannerState:
    """Return a state with experts in place of home positions, as it is saved."""
    return _renumbered(state, [(home.layout_of_experts, home.by_expert) for home in homes])


def by_position(state: PlannerState, homes: Sequence[HomeOrder]) -> PlannerState:
    """Return a saved state with home positions in place of experts."""
    return _renumbered(state, [(home.layout_of_positions, home.by_position) for home in homes])


def _renumbered(
    state: PlannerState,
    changes: Sequence[tuple[Callable[[ExpertLayout], ExpertLayout], Callable[[Int64], Int64]]],
) -> PlannerState:
    def layouts(of: Sequence[ExpertLayout]) -> tuple[ExpertLayout, ...]:
        return tuple(change(one) for one, (change, _) in zip(of, changes, strict=True))

    forecasts = zip(state.forecasts, changes, strict=True)
    return replace(
        state,
        layouts=layouts(state.layouts),
        forecasts=tuple(forecast.changed(change) for forecast, (_, change) in forecasts),
        plans=tuple(replace(plan, layouts=layouts(plan.layouts)) for plan in state.plans),
    )


def report_resumption(resumption: Resumption | None, first_step: int) -> None:
    """Log one line for the whole run, if it was resumed. Collective over the world."""
    version = problem = None
    if resumption is not None:
        problem = resumption.problem
        if resumption.state is not None:
            version = resumption.state.version
        elif problem is None and first_step > 0:
            problem = "what the run is resumed from has no place for the planner's state"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (version, problem))
    if dist.get_rank() != 0:
        return
    versions = sorted(version for version, _ in everyone if version is not None)
    problems = [problem for _, problem in everyone if problem is not None]
    groups = len(versions) + len(problems)
    if problems:
        some = f" in {len(problems)} of {groups} groups" if groups > 1 else ""
        logger.warning(
            "FSEP: planning starts anew, from the static layout%s: %s", some, problems[0]
        )
    elif versions:
        least, most = versions[0], versions[-1]
        logger.info(
            "FSEP: the planner's state is restored: training goes on with step %d, layout version "
            "%s%s",
            first_step,
            least if least == most else f"{least} to {most}",
            f", {groups} groups" if groups > 1 else "",
        )


def _read_state(path: str, storage: Any) -> bytes:
    with storage.open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size > _MAX_FILE_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than {_MAX_FILE_BYTES}")
        file.seek(0)
        data: bytes = file.read()
    return data
