"""Probes of the FSEP run on this rank, which `train` calls after each step."""

from __future__ import annotations

from typing import Any

from megatron_laer import session
from megatron_laer.runtime.coordinator import Coordinator


def running() -> Coordinator:
    """Return the coordinator of a run that has one."""
    found = session.current_coordinator()
    assert found is not None, "the run is not one of FSEP"
    return found


def layout_version(_model: object) -> int:
    return running().layouts.version


def layouts_in_force(_model: object) -> tuple[int, list[Any]]:
    """Return the version of the layouts, and the expert of each slot by layer."""
    layouts = running().layouts
    return layouts.version, [layout.to_list() for layout in layouts.layouts]
