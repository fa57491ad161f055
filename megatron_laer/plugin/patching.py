"""`Patch` finds an attribute of Megatron by name, replaces it once, and restores it."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_laer.megatron_version import megatron_version
from megatron_laer.releases import TESTED_RANGE


@dataclass(frozen=True)
class Patch:
    """Attribute to replace, and its replacement.

    `path` is `name` or `Class.name` in the module. `replace` is called with the original. `reason`
    and `also`, further changes to Megatron, are for the printed table.
    """

    module: str
    path: str
    replace: Callable[[Any], Any]
    reason: str
    also: tuple[str, ...] = ()

    def owner_and_name(self) -> tuple[Any, str]:
        try:
            owner: Any = importlib.import_module(self.module)
            *parents, name = self.path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"megatron_laer needs {self.module}.{self.path} ({self.reason}), which "
                f"megatron-core {megatron_version()} does not have ({error}); tested with "
                f"{TESTED_RANGE}"
            ) from error
        return owner, name


def around(
    module: str, path: str, reason: str, *, also: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Patch]:
    """Return a decorator that makes a patch of a function, called with Megatron's own first."""

    def as_patch(function: Callable[..., Any]) -> Patch:
        def replace(original: Any) -> Any:
            # Without an instance to bind to, as a class method or a static one.
            kind = type(original) if isinstance(original, classmethod | staticmethod) else None
            inner = original if kind is None else original.__func__

            @functools.wraps(inner)
            def replaced(*args: Any, **kwargs: Any) -> Any:
                return function(inner, *args, **kwargs)

            return replaced if kind is None else kind(replaced)

        return Patch(module, path, replace, reason, also)

    return as_patch


_applied: dict[Patch, tuple[Any, str, Any]] = {}
# Changes by Megatron's own setters, by changed object.
_noted: dict[str, str] = {}


def apply(patch: Patch) -> bool:
    """Replace the attribute; return False if it is replaced already."""
    if patch in _applied:
        return False
    owner, name = patch.owner_and_name()
    # The raw attribute, so that a classmethod is restored as one.
    original = inspect.getattr_static(owner, name)
    setattr(owner, name, patch.replace(original))
    _applied[patch] = (owner, name, original)
    return True


def undo(patch: Patch) -> None:
    if patch in _applied:
        owner, name, original = _applied.pop(patch)
        setattr(owner, name, original)


def original_of(patch: Patch) -> Any:
    """Return Megatron's own attribute, replaced or not."""
    if patch in _applied:
        return _applied[patch][2]
    owner, name = patch.owner_and_name()
    return inspect.getattr_static(owner, name)


def note(target: str, change: str) -> None:
    """Add a change that replaces no attribute to the table."""
    _noted[target] = change


def forget(target: str) -> None:
    _noted.pop(target, None)


def patch_table() -> str:
    """Describe all current changes in Megatron, one line each."""
    rows = [f"{target}: {change}" for target, change in _noted.items()]
    for patch in reversed(_applied):
        further = [f"  also {change}" for change in patch.also]
        rows = [f"{patch.module}.{patch.path}: {patch.reason}", *further, *rows]
    return "\n".join(f"  {row}" for row in rows)
