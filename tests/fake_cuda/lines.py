"""Lines of this package that only a card runs, found in its source and by runs.

They are statements under a condition on the device, Triton's kernels, and functions that runs on
the labelled device enter and the same runs on the CPU do not. A statement is named by its file,
function and text, so that an edit elsewhere changes no name.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = ROOT / "megatron_laer"
# The CPU's own part, and tools other than calibration, never run in training on a card.
_LEFT_OUT = re.compile(r"cpu/|tools/(?!calibration/)")
_OF_DEVICE = re.compile(r"cuda\b|has_streams|kernels\b|self\._stream\b|_uses_nccl|cpu_installed")
_OF_CPU = re.compile(r"is None|!= 'cuda'|== 'cpu'|not has_streams")

Line = tuple[str, int]


class Statement(NamedTuple):
    """Statement inside a function, and its lines without those of a block that it begins."""

    file: str
    function: str
    text: str
    first: int
    last: int

    @property
    def name(self) -> tuple[str, str, str]:
        return self.file, self.function, self.text

    def was_run(self, lines: set[Line]) -> bool:
        return any((self.file, line) in lines for line in range(self.first, self.last + 1))


class Function(NamedTuple):
    """Function with its statements, those under a condition on the device apart."""

    statements: list[Statement]
    of_card: list[Statement]


def functions() -> Iterator[Function]:
    """Yield every function of the package, without those inside it."""
    for path in sorted(_PACKAGE.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if not _LEFT_OUT.match(path.relative_to(_PACKAGE).as_posix()):
            source = path.read_text()
            yield from _functions(ast.parse(source), file, source.splitlines(), "")


def _functions(tree: ast.AST, file: str, text: list[str], inside: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, file, text, f"{inside}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            name = f"{inside}{node.name}"
            is_kernel = any("triton" in ast.unparse(each) for each in node.decorator_list)
            found = list(_statements(node.body, is_kernel))
            made = [(_statement(each, file, name, text), guarded) for each, guarded in found]
            yield Function([each for each, _ in made], [each for each, guarded in made if guarded])
            yield from _functions(node, file, text, f"{name}.")
        elif isinstance(node, ast.stmt):
            yield from _functions(node, file, text, inside)


def _statements(block: list[ast.stmt], guarded: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield statements, each with whether a condition on the device is above it."""
    for node in block:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        yield node, guarded
        test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        on_device = bool(_OF_DEVICE.search(test))
        on_cpu = on_device and bool(_OF_CPU.search(test))
        for name in ("body", "orelse", "finalbody"):
            of_card = on_device and (name == "body") != on_cpu
            yield from _statements(getattr(node, name, []), guarded or of_card)
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body, guarded)
        if on_cpu and isinstance(node.body[-1], ast.Return | ast.Raise):  # type: ignore[attr-defined]
            guarded = True


def _statement(node: ast.stmt, file: str, function: str, text: list[str]) -> Statement:
    body = getattr(node, "body", None)
    last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
    return Statement(file, function, text[node.lineno - 1].strip(), node.lineno, last)


def only_on_card(on_cpu: set[Line], on_card: set[Line]) -> list[Statement]:
    """Return the statements that only a card runs."""
    found: dict[Statement, None] = {}
    for function in functions():
        run_on_cpu, run_on_card = (
            [each for each in function.statements if each.was_run(lines)]
            for lines in (on_cpu, on_card)
        )
        whole = function.statements if run_on_card and not run_on_cpu else []
        more = [each for each in run_on_card if each not in run_on_cpu]
        found |= dict.fromkeys([*function.of_card, *whole, *more])
    return list(found)


def recorded[T](run: Callable[[], T]) -> tuple[T, list[Line]]:
    """Return the result of a function, and the package's lines that this process runs meanwhile."""
    tool, monitoring = sys.monitoring.COVERAGE_ID, sys.monitoring
    seen: set[Line] = set()
    prefix = f"{ROOT}/"

    def on_line(code: object, line: int) -> object:
        name: str = code.co_filename  # type: ignore[attr-defined]
        if name.startswith(f"{_PACKAGE}/"):
            seen.add((name.removeprefix(prefix), line))
        return monitoring.DISABLE

    monitoring.use_tool_id(tool, "lines")
    monitoring.register_callback(tool, monitoring.events.LINE, on_line)
    monitoring.set_events(tool, monitoring.events.LINE)
    monitoring.restart_events()
    try:
        return run(), sorted(seen)
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


def union(parts: Iterable[Iterable[Line]]) -> set[Line]:
    return {line for part in parts for line in part}
