"""Every error message and warning of the package, read from its sources for docs/errors.md.

Nothing is raised. A message is found where an exception is raised, and where a list of problems is
put together that one exception then names. `unread` tells of what is raised and could not be read,
so that no error is missing on the page without a test saying so.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_laer import choices, environment

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_laer"
NATIVE = PACKAGE / "planner" / "native" / "module.cpp"
SLURM = ROOT / "scripts" / "slurm" / "pretrain.sbatch"

# Expressions that put a text together.
_TEXT = (ast.Constant, ast.JoinedStr, ast.IfExp, ast.BinOp)

# What a message has in place of what is filled in, where that has no name: else its name, in
# capitals.
GAP = "…"

# Exceptions that say something to people; of others, such as SystemExit, only a status is left.
_ERROR = re.compile(r"Error$")
# Functions that put sentences together for one error, or for warnings: their names say so.
_LISTS = re.compile(r"problem|_nothing_fits|_describe_mismatch")
# What says where another message is about, or comes from such a function.
_READ_ELSEWHERE = re.compile(rf"{_LISTS.pattern}|\b(error|found|message|refused)\b")
_WARNED = re.compile(r"^warnings")
_LEAST_WORDS = 3
_JOINED_GAPS = re.compile(f"{GAP}+")
_WAY_OUT = re.compile(
    "[:,] (?=(must|enter|give|use|take|expected|write|known are|at least|at most|pass|they are)\\b)"
)


@dataclass(frozen=True)
class Message:
    """One message: its source, relative to the package, its text with gaps, and its line there."""

    source: str
    text: str
    line: int

    @property
    def said(self) -> str:
        """What is wrong, and why."""
        return self._parts[0]

    @property
    def way_out(self) -> str:
        """What the message says would work; empty where it says nothing of that."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[str, str]:
        # By the project's rule the way out follows the last semicolon, or it is short and the end.
        said, _, way_out = self.text.rpartition("; ")
        if way_out.startswith("or "):
            said, way_out = "", self.text.replace("; or ", ", or ")
        if not said and (short := _WAY_OUT.search(way_out)):
            return way_out[: short.start()], way_out[short.end() :]
        if said and _says_something(way_out, 1):
            return said.rstrip("; "), way_out
        return self.text.rstrip("; "), ""


def messages(root: Path = PACKAGE) -> list[Message]:
    """Every message of a package, by source and in the order of its lines, each once."""
    found: dict[tuple[str, str], Message] = {}
    for source in _sources(root):
        for message in sorted(source.messages(), key=lambda message: message.line):
            found.setdefault((message.source, message.text), message)
    return list(found.values())


def native_messages() -> list[Message]:
    """What the functions of the native core refuse."""
    text, name = NATIVE.read_text(encoding="utf-8"), str(NATIVE.relative_to(PACKAGE))
    return [
        Message(
            name,
            GAP.join(re.findall(r'"([^"]*)"', error[1])),
            text.count("\n", 0, error.start()) + 1,
        )
        for error in re.finditer(r"\bvalue_error\((.*?)\);", text, re.DOTALL)
    ]


def warnings() -> list[Message]:
    """Every warning of the package."""
    return [warning for source in _sources(PACKAGE) for warning in source.warnings()]


def script_messages() -> list[Message]:
    """Every message with which the batch script for Slurm stops."""
    text = SLURM.read_text(encoding="utf-8").replace('" \\\n', '"\n')
    found = re.findall(r'\bstop ("(?:[^"\\]|\\.)*"(?:\s+"(?:[^"\\]|\\.)*")*)', text)
    plain = [" ".join(re.findall(r'"((?:[^"\\]|\\.)*)"', words)) for words in found]
    filled = re.compile(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+")
    return [Message(SLURM.name, filled.sub(GAP, words), 0) for words in plain]


def unread(root: Path = PACKAGE) -> set[str]:
    """Where something is raised whose message was not found: `source: what is raised`."""
    return {
        f"{source.name}: {raised}"
        for source in _sources(root)
        for error in source.raised()
        if not source.texts_of(error) and not _READ_ELSEWHERE.search(raised := ast.unparse(error))
    }


def _sources(root: Path) -> list[_Source]:
    # What is for tests has no users.
    paths = sorted(path for path in root.rglob("*.py") if "testing" not in path.parts)
    return [_Source(path, root) for path in paths]


class _Source:
    """One file of the package, as its syntax tree."""

    def __init__(self, path: Path, root: Path) -> None:
        self.name = str(path.relative_to(root))
        self._tree = ast.parse(path.read_text(encoding="utf-8"))
        self._constants = {
            target.id: node.value
            for node in self._tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in self._tree.body:
            if isinstance(node, ast.ImportFrom) and node.module == environment.__name__:
                names = (name.name for name in node.names)
                self._constants |= {n: ast.Constant(getattr(environment, n)) for n in names}
        self._scope_of = {
            child: function
            for function in ast.walk(self._tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.walk(function)
        }

    def messages(self) -> Iterator[Message]:
        """The messages of errors that are raised, and of lists of problems."""
        for error in self.raised():
            for text in self.texts_of(error):
                yield Message(self.name, text, error.lineno)
        for function in ast.walk(self._tree):
            if isinstance(function, ast.FunctionDef) and _LISTS.search(function.name):
                yield from self._sentences(function)

    def warnings(self) -> Iterator[Message]:
        """What is logged as a warning, and lists of warnings."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logger.warning":
                for text in self._texts(node.args[0], self._scope_of.get(node)):
                    filled = re.sub(r"%(\.\d)?[sdrf]", GAP, text)
                    if _says_something(filled):
                        yield Message(self.name, filled, node.lineno)
            if isinstance(node, ast.FunctionDef) and _WARNED.search(node.name):
                yield from self._sentences(node)

    def raised(self) -> Iterator[ast.Call]:
        """Errors that are made where they are raised; a bare name is raised again."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                if _ERROR.search(name) and not name.startswith("self."):
                    yield node.exc

    def texts_of(self, error: ast.Call) -> list[str]:
        """The messages that an error may have."""
        if not error.args:
            return []
        scope = self._scope_of.get(error)
        return [text for text in self._texts(error.args[0], scope) if _says_something(text)]

    def _sentences(self, function: ast.FunctionDef) -> Iterator[Message]:
        doc = ast.get_docstring(function, clean=False)
        nodes = list(ast.walk(function))
        inside = {id(part) for node in nodes for part in _parts_of_text(node)}
        filled_in = (node for node in nodes if isinstance(node, ast.FormattedValue))
        used = {ast.unparse(name) for value in filled_in for name in ast.walk(value)}
        for node in nodes:
            # What a name holds is read where the name is used.
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in used:
                inside |= {id(part) for part in ast.walk(node)}
        for node in nodes:
            named = isinstance(node, ast.Name) and node.id in self._constants
            if not (named or isinstance(node, ast.JoinedStr | ast.Constant)) or id(node) in inside:
                continue
            for text in self._texts(node, function):
                if text != doc and len(text.split()) >= _LEAST_WORDS and _says_something(text):
                    yield Message(self.name, text, node.lineno)

    def _texts(self, node: ast.expr, scope: ast.AST | None, depth: int = 0) -> list[str]:
        """What an expression may be, with a gap for each part that is not known."""
        if depth > 4:
            return [GAP]
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.FormattedValue(value=ast.Name(id=name)) if name in self._constants:
                return self._texts(self._constants[name], None, depth + 1)
            case ast.FormattedValue(value=ast.Attribute(value=ast.Name(id=kind), attr=word)) if (
                hasattr(choices, kind)
            ):
                # Such as PlanMode.FORECAST: words of flags.
                return [str(getattr(getattr(choices, kind), word))]
            case ast.FormattedValue(value=ast.IfExp() as either):
                return self._texts(either, scope, depth + 1)
            case ast.FormattedValue(value=ast.Name(id=name)) if (
                scope is not None
                and (given := _given_to(name, scope))
                and all(isinstance(value, _TEXT) for value in given)
            ):
                return [text for value in given for text in self._texts(value, scope, depth + 1)]
            case ast.FormattedValue(value=value):
                return [_name_of(value)]
            case ast.JoinedStr(values=values):
                return self._joined(values, scope, depth)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined([left, right], scope, depth)
            case ast.IfExp(body=body, orelse=other):
                return [*self._texts(body, scope, depth), *self._texts(other, scope, depth)]
            case ast.Name(id=name) if scope is not None and (values := _given_to(name, scope)):
                return [t for value in values for t in self._texts(value, scope, depth + 1)]
            case ast.Name(id=name) if name in self._constants:
                return self._texts(self._constants[name], None, depth + 1)
        return [GAP]

    def _joined(self, parts: list[ast.expr], scope: ast.AST | None, depth: int) -> list[str]:
        parts_texts = [self._texts(part, scope, depth) for part in parts]
        return [_JOINED_GAPS.sub(GAP, "".join(words)) for words in itertools.product(*parts_texts)]


def _given_to(name: str, scope: ast.AST) -> list[ast.expr]:
    """What a function gives to a variable of its own."""
    return [
        node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.NamedExpr)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == name
    ]


def _name_of(value: ast.expr) -> str:
    """How a message shows what is filled in."""
    match value:
        case ast.Attribute(attr="__name__"):
            return "TYPE"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            # Without the letters of a shape.
            return re.sub(r"_[A-Z0-9]{1,3}$", "", name.strip("_")).upper()
        case ast.Call(func=ast.Name(id="quoted" | "str" | "list" | "sorted" | "int"), args=args):
            return _name_of(args[0])
    return GAP


def _parts_of_text(node: ast.AST) -> Iterator[ast.AST]:
    """What is inside of a text that is put together, or of a subscript: no text of its own."""
    if isinstance(node, ast.JoinedStr | ast.Subscript):
        yield from itertools.islice(ast.walk(node), 1, None)


def _says_something(text: str, words: int = 2) -> bool:
    """Tell whether a text is more than what wraps another message."""
    return text.startswith("--") or len(re.findall(r"\b[a-z]{2,}", text)) >= words
