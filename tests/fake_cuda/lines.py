"""Lines of this package that only a card runs, found in its source, and a record of those that run.

Conditions are evaluated as the CPU would, so far as they are known: `.type == "cuda"`, `.is_cuda`,
`on_cuda`, `"nccl" in …` and `torch.cuda.is_available()` are false, and functions that return such a
condition, or None behind one, have its value. Names are None that are annotated as CUDA's streams
or events or None, or that a known condition sets so. Only a card runs:

* the statements under a condition on the side that the CPU does not take, and those behind a side
  that the CPU leaves the block by;
* functions of a module that imports Triton, kernels among them, or that has a constant with a
  module's name in Transformer Engine, apart from `problem`, its refusal on the CPU;
* functions that make, find or enter CUDA's streams or make events without a condition;
* functions and classes whose names occur in such code alone.

A statement counts as one line, and one with a block as its first. Imports, docstrings and
definitions do not count, nor do `cpu/` and `tools/`, which do not train on a card.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = ROOT / "megatron_laer"
_LEFT_OUT = "cpu", "tools"
_STREAMS = {f"torch.cuda.{name}" for name in ("Stream", "stream", "Event", "current_stream")}
_UNKNOWN = object()
_Definition = ast.FunctionDef | ast.ClassDef
_UNCOUNTED = _Definition | ast.Import | ast.ImportFrom

Line = tuple[str, int]


class Statement(NamedTuple):
    """Statement of a function, by its lines without a block that it begins."""

    file: str
    first: int
    last: int
    function: str
    text: str

    def was_run(self, lines: set[Line]) -> bool:
        return any((self.file, line) in lines for line in range(self.first, self.last + 1))


def only_on_card() -> list[Statement]:
    """Return the statements that only a card runs, by file and line."""
    source = _Source()
    return sorted(one for file in source.trees for one in source.statements(file))


class _Source:
    """The package's modules by file, and what of them only a card runs.

    Attributes:
        of_card: definitions, statements and expressions, with all that is inside them.
    """

    def __init__(self) -> None:
        paths = sorted(_PACKAGE.rglob("*.py"))
        self._text = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
        self.trees = {file: ast.parse(text) for file, text in self._text.items()}
        self.of_card: set[ast.AST] = set()
        self._none: set[tuple[str, str]] = set()
        self._returned: dict[str, object] = {}
        self._trained = {
            file: tree for file, tree in self.trees.items() if file.split("/")[1] not in _LEFT_OUT
        }
        for _ in range(3):  # since values rest on each other
            self._find_values()
        for file, tree in self._trained.items():
            self._find_modules(tree)
            self._find_branches(file, tree)
        for tree in self._trained.values():
            self._find_streams(tree, None)
        definitions = [
            node
            for tree in self._trained.values()
            for node in ast.walk(tree)
            if isinstance(node, _Definition) and not node.name.startswith("__")
        ]
        while self._find_used_there_alone(definitions):
            pass

    def statements(self, file: str) -> Iterator[Statement]:
        lines = self._text[file].splitlines()

        def inside(node: ast.AST, function: str, is_card: bool) -> Iterator[Statement]:
            is_card |= node in self.of_card
            if isinstance(node, _Definition):
                function = f"{function}.{node.name}".lstrip(".")
            elif isinstance(node, ast.stmt) and is_card and not _is_uncounted(node):
                body = getattr(node, "body", None)
                last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
                text = lines[node.lineno - 1].strip()
                yield Statement(file, node.lineno, last or node.lineno, function, text)
            for child in ast.iter_child_nodes(node):
                yield from inside(child, function, is_card)

        return inside(self.trees[file], "", False)

    def _find_values(self) -> None:
        returned: dict[str, list[object]] = defaultdict(list)
        for file, tree in self._trained.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.AnnAssign):
                    kind = ast.unparse(node.annotation)
                    if "torch.cuda." in kind and kind.endswith("| None"):
                        self._none.add((file, _last(node.target)))
                elif isinstance(node, ast.Assign) and not isinstance(node.value, ast.Constant):
                    if self._value(file, node.value) is None:
                        self._none.add((file, _last(node.targets[0])))
                elif isinstance(node, ast.FunctionDef):
                    returned[node.name].append(self._of_body(file, node.body))
        self._returned = {
            name: values[0] if len({*values}) == 1 else _UNKNOWN
            for name, values in returned.items()
        }

    def _of_body(self, file: str, body: list[ast.stmt]) -> object:
        """Return the value of a function, if its first statement tells."""
        first, *_ = [node for node in body if not _is_uncounted(node)] or body
        if isinstance(first, ast.If) and self._value(file, first.test) is True:
            first = first.body[0]
        if isinstance(first, ast.Return) and first.value is not None:
            return self._value(file, first.value)
        return _UNKNOWN

    def _value(self, file: str, node: ast.expr) -> object:
        """Return an expression's value on the CPU: True, False, None, or unknown."""
        match node:
            case ast.Constant(value=True | False | None):
                return node.value
            case ast.NamedExpr():
                return self._value(file, node.value)
            case ast.UnaryOp(op=ast.Not()):
                value = self._value(file, node.operand)
                return _UNKNOWN if value is _UNKNOWN else not value
            case ast.BoolOp():
                decides = isinstance(node.op, ast.Or)
                values = {self._value(file, each) for each in node.values}
                known = {decides} if decides in values else values
                return known.pop() if len(known) == 1 else _UNKNOWN
            case ast.IfExp():
                taken = self._value(file, node.test)
                if taken is _UNKNOWN:
                    return _UNKNOWN
                return self._value(file, node.body if taken else node.orelse)
            case ast.Call():
                name = ast.unparse(node.func)
                is_cuda = name == "torch.cuda.is_available"
                return False if is_cuda else self._returned.get(_last(node.func), _UNKNOWN)
            case ast.Name() | ast.Attribute():
                if (file, _last(node)) in self._none:
                    return None
                return False if _last(node).lstrip("_") in ("is_cuda", "on_cuda") else _UNKNOWN
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as op], comparators=[ast.Constant(None)]):
                value = self._value(file, node.left)
                is_none = isinstance(op, ast.Is)
                return _UNKNOWN if value is _UNKNOWN else (value is None) is is_none
            case ast.Compare(left=ast.Constant("nccl"), ops=[ast.In()]):
                return False
            case ast.Compare(
                left=ast.Attribute(attr="type"),
                ops=[ast.Eq() | ast.NotEq() as op],
                comparators=[ast.Constant("cuda" | "cpu" as named)],
            ):
                return (named == "cpu") is isinstance(op, ast.Eq)
        return _UNKNOWN

    def _find_modules(self, tree: ast.Module) -> None:
        """Find functions of modules for Triton and Transformer Engine."""
        named = {
            alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        }
        named |= {
            node.value.value.partition(".")[0]
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        }
        if named & {"triton", "transformer_engine"}:
            self.of_card |= {
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.name != "problem"
            }

    def _find_branches(self, file: str, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp):
                taken = self._value(file, node.test)
                if taken is not _UNKNOWN:
                    self.of_card.add(node.orelse if taken else node.body)
            elif isinstance(node, ast.BoolOp):
                values = [self._value(file, each) for each in node.values]
                decides = isinstance(node.op, ast.Or)
                if decides in values:
                    self.of_card |= {*node.values[values.index(decides) + 1 :]}
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list):
                    self._find_in_block(file, block)

    def _find_in_block(self, file: str, block: list[ast.stmt]) -> None:
        for at, node in enumerate(block):
            if not isinstance(node, ast.If):
                continue
            taken = self._value(file, node.test)
            if taken is _UNKNOWN:
                continue
            self.of_card |= {*(node.orelse if taken else node.body)}
            mine = node.body if taken else node.orelse
            if mine and isinstance(mine[-1], ast.Return | ast.Raise | ast.Continue | ast.Break):
                self.of_card |= {*block[at + 1 :]}

    def _find_streams(self, node: ast.AST, function: ast.AST | None) -> None:
        """Find functions that use CUDA's streams or events without a condition."""
        if node in self.of_card:
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _STREAMS and function:
            self.of_card.add(function)
        if isinstance(node, ast.FunctionDef):
            function = node
        for child in ast.iter_child_nodes(node):
            self._find_streams(child, function)

    def _find_used_there_alone(self, definitions: list[_Definition]) -> bool:
        """Find definitions whose names occur in code of a card alone; return whether there are."""
        there, elsewhere = set[str](), set[str]()
        for tree in self.trees.values():
            self._find_names(tree, False, there, elsewhere)
        found = {
            node
            for node in definitions
            if node.name in there - elsewhere and node not in self.of_card
        }
        self.of_card |= found
        return bool(found)

    def _find_names(self, node: ast.AST, is_card: bool, there: set[str], other: set[str]) -> None:
        is_card |= node in self.of_card
        if isinstance(node, ast.Name | ast.Attribute):
            (there if is_card else other).add(_last(node))
        annotations = {getattr(node, name, None) for name in ("annotation", "returns")}
        for child in ast.iter_child_nodes(node):
            if child not in annotations:
                self._find_names(child, is_card, there, other)


def _last(node: ast.expr) -> str:
    """Return the last part of a dotted name, or "" of another expression."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_uncounted(node: ast.stmt) -> bool:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, _UNCOUNTED)


def recorded(run: Callable[[], object]) -> list[Line]:
    """Return the package's lines that this process runs in a call."""
    monitoring, tool = sys.monitoring, sys.monitoring.COVERAGE_ID
    seen: set[Line] = set()

    def on_line(code: CodeType, line: int) -> object:
        path = Path(code.co_filename)
        if path.is_relative_to(_PACKAGE):
            seen.add((path.relative_to(ROOT).as_posix(), line))
        return monitoring.DISABLE

    monitoring.use_tool_id(tool, "lines of a card")
    monitoring.register_callback(tool, monitoring.events.LINE, on_line)
    monitoring.set_events(tool, monitoring.events.LINE)
    try:
        run()
    finally:
        monitoring.set_events(tool, monitoring.events.NO_EVENTS)
        monitoring.free_tool_id(tool)
    return sorted(seen)
