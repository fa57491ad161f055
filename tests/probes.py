"""Probes of the FSEP run on this rank: of `train` after each step, and of calls in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from megatron_laer import session
from megatron_laer.runtime.coordinator import Coordinator


def running() -> Coordinator:
    """Return the coordinator of a run that has one."""
    found = session.current_coordinator()
    assert found is not None, "the run is not one of FSEP"
    return found


@contextlib.contextmanager
def watching(*watched: tuple[Any, str, Callable[..., object]]) -> Iterator[None]:
    """Notice each call of functions before it is made, given (owner, name, notice)."""

    def noticed(function: Callable[..., Any], notice: Callable[..., object]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            notice(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, notice in watched:
            replaced = noticed(getattr(owner, name), notice)
            stack.enter_context(mock.patch.object(owner, name, replaced))
        yield


def layouts_in_force(_model: object) -> tuple[int, list[Any]]:
    """Return the version of the layouts, and the expert of each slot by layer."""
    layouts = running().layouts
    return layouts.version, [layout.to_list() for layout in layouts.layouts]
