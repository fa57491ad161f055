"""A deliberate fault, which the labelled device or its checker of races must report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock


class Fault(NamedTuple):
    """Replaced function, a part of the report about it, and the scene in which it shows.

    Attributes:
        found: by default a race.
        one_queue: whether the card has one hardware queue.
        at_night: whether it is left to the night.
    """

    replaced: Callable[[], AbstractContextManager[Any]]
    found: str = "nothing orders them"
    scene: str = "plain"
    one_queue: bool = False
    at_night: bool = False


def replaced(owner: Any, name: str, replacement: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, replacement)
