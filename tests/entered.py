"""Functions of this project that a run enters, and those whose code names a card.

A function's name is its file, from the project's root, and its qualified name.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

from tests.documents import ROOT

_TOOL = 4  # one of `sys.monitoring` that no kind of tool has by convention
_NAMES = {"cuda", "is_cuda", "nccl"}


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """Yield the functions that this process enters, without bodies of modules and classes."""
    entered = set[str]()
    monitoring = sys.monitoring

    def started(code: CodeType, _offset: int) -> object:
        path = Path(code.co_filename)
        is_ours = path.is_relative_to(ROOT) and ".venv" not in path.parts
        if is_ours and code.co_flags & inspect.CO_OPTIMIZED:
            entered.add(_named(path, code.co_qualname))
        return monitoring.DISABLE

    monitoring.use_tool_id(_TOOL, "functions that are entered")
    monitoring.register_callback(_TOOL, monitoring.events.PY_START, started)
    monitoring.set_events(_TOOL, monitoring.events.PY_START)
    monitoring.restart_events()  # an earlier run's are disabled still
    try:
        yield entered
    finally:
        monitoring.set_events(_TOOL, monitoring.events.NO_EVENTS)
        monitoring.free_tool_id(_TOOL)


def naming_a_card(*folders: str) -> set[str]:
    """Return the functions and methods in these folders whose code names CUDA or NCCL."""
    return {
        _named(path, name)
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for name, function in _functions(ast.parse(path.read_text(encoding="utf-8")), "")
        if any(_names_a_card(node) for node in ast.walk(function))
    }


def _functions(node: ast.Module | ast.ClassDef, of: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef):
            yield f"{of}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{of}{child.name}.")


def _names_a_card(node: ast.AST) -> bool:
    name = getattr(node, "attr", None) or getattr(node, "value", None)
    return isinstance(name, str) and name in _NAMES


def _named(path: Path, function: str) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{function}"
