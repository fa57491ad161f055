"""A table of deliberate faults (`faults.txt`): an expression or statement of a definition, changed.

Each was chosen because it trains on without a crash, or hides behind the usual path. Its tests must
fail with it; `__main__` plants and runs them. The table reads

    # FILE below megatron_laer: PYTEST ARGUMENTS
    NAME
        DEFINITION: RIGHT => WRONG

A definition is a function, a class or a constant, and the first match in it is changed. Line breaks
and quotes of the code do not count. `pass` takes the place of a statement.

If a fault's text is not in the code, `planted` raises a MisfitError, and one test of
`tests/unit/test_planted.py` fails. It is marked `texts`, as it says nothing of what the code does:
`-m "not texts"` leaves it out where a test is sought that notices a change.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TABLE = Path(__file__).with_name("faults.txt")
_FAULT = re.compile(r"(?P<name>\S.*)\n(?P<change>(?: {4}.*\n)+)")


class MisfitError(ValueError):
    """Deliberate fault that cannot be planted, since its text is not in the file."""

    def __init__(self, place: str, missing: str) -> None:
        super().__init__(f"the fault's text is not in the file: {place} has no {missing}")


@dataclass(frozen=True)
class Fault:
    """One deliberate fault of `definition` in `file`; one of pytest's `tests` fails with it."""

    name: str
    file: str
    definition: str
    right: str
    wrong: str
    tests: tuple[str, ...]


def read(table: Path) -> Iterator[Fault]:
    for section in table.read_text(encoding="utf-8").split("# ")[1:]:
        head, _, faults = section.partition("\n")
        file, _, tests = head.partition(": ")
        for found in _FAULT.finditer(faults):
            definition, _, change = " ".join(found["change"].split()).partition(": ")
            right, _, wrong = change.partition(" => ")
            yield Fault(found["name"], file, definition, right, wrong, (*shlex.split(tests),))


FAULTS = (*read(_TABLE),)


def planted(fault: Fault, content: str) -> str:
    """Return the file's content with the fault; raise a MisfitError if its text is not there."""
    right, wrong = ast.parse(fault.right).body[0], fault.wrong
    if isinstance(right, ast.Expr) and [*map(type, ast.parse(wrong).body)] == [ast.Expr]:
        right, wrong = right.value, f"({wrong})"  # type: ignore[assignment]
    nodes = ast.walk(defined(fault, content))
    matches = [node for node in nodes if _shape(node) == _shape(right)]
    if not matches:
        raise MisfitError(f"{fault.definition} of {fault.file}", repr(fault.right))
    first = min(matches, key=lambda node: _span(node, content))
    start, end = _span(first, content)
    code = content.encode()
    return (code[:start] + wrong.encode() + code[end:]).decode()


def defined(fault: Fault, content: str) -> ast.AST:
    """Return the fault's definition; raise a MisfitError if the file has none of that name."""
    node: ast.AST = ast.parse(content)
    for name in fault.definition.split("."):
        found = [child for child in ast.walk(node) if name in _names(child)]
        if not found:
            raise MisfitError(fault.file, fault.definition)
        node = found[0]
    return node


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        parts = (part for target in node.targets for part in ast.walk(target))
        return {part.id for part in parts if isinstance(part, ast.Name)}
    return set()


def _shape(node: ast.AST) -> str:
    return ast.dump(node).replace("Store()", "Load()")


def _span(node: ast.AST, content: str) -> tuple[int, int]:
    """Return the first byte of a node's code, and the one after its last."""
    lines = content.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    return (
        starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
        starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
    )
