"""Deliberate faults planted in this process, each of which the labelled device must report.

Tables have the form of `tests/planted/faults.txt`, with a module in place of a file, and in place
of tests: a case, a part of the report about it, and perhaps the words below.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from tests.planted import faults as planted

ONE_QUEUE, AT_NIGHT = "one-queue", "at-night"


class Fault(NamedTuple):
    """Changes of functions, the case in which they show, a part of the report, and words."""

    changes: list[planted.Fault]
    case: str
    found: str
    words: tuple[str, ...]

    def misfit(self) -> planted.MisfitError | None:
        """Return why the fault cannot be planted, if it cannot; the modules are not imported."""
        try:
            for change in self.changes:
                planted.planted(change, _file_of(change.file).read_text())
        except planted.MisfitError as error:
            return error
        return None

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(_changed(change))
            yield


def read(table: Path) -> dict[str, Fault]:
    """Return a table's faults by name; sections that share one have its changes."""
    changes = defaultdict[str, list[planted.Fault]](list)
    for change in planted.read(table):
        changes[change.name].append(change)
    found = {}
    for name, of_fault in changes.items():
        case, report, *words = of_fault[0].tests
        found[name] = Fault(of_fault, case, report, tuple(words))
    return found


def _file_of(module: str) -> Path:
    package, *rest = module.split(".")
    found = importlib.util.find_spec(package)
    folders = [] if found is None else found.submodule_search_locations or []
    paths = [Path(folder, *rest).with_suffix(".py") for folder in folders]
    if not any(path.is_file() for path in paths):
        raise planted.MisfitError("Python", module)
    return next(path for path in paths if path.is_file())


@contextlib.contextmanager
def _changed(change: planted.Fault) -> Iterator[None]:
    """Change a function in place, so that all who imported it have the fault."""
    module = importlib.import_module(change.file)
    function: Any = inspect.unwrap(attrgetter(change.definition)(module))
    source = planted.planted(change, inspect.getsource(module))
    whole = compile(source, inspect.getfile(module), "exec", dont_inherit=True)
    right, function.__code__ = function.__code__, _code_of(whole, change.definition)
    try:
        yield
    finally:
        function.__code__ = right


def _code_of(code: CodeType, name: str) -> CodeType:
    left = [code]
    while left:
        found = left.pop()
        if found.co_qualname == name:
            return found
        left += [part for part in found.co_consts if isinstance(part, CodeType)]
    raise ValueError(f"{code.co_filename} has no function {name}")
