"""Docstrings begin with a sentence: this holds the part of that which a machine can tell."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.documents import ROOT

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# With these a first line names a thing, or a clause, and says nothing about it.
CLAUSE_WORDS = frozenset({"What", "Which", "Whose", "Whether", "How", "Why", "Of"})
# A function's first line begins with what it does.
NOUN_WORDS = frozenset({"A", "All", "An", "Each", "Every", "One", "That", "The", "This", "Those"})


def faults(source: str) -> Iterator[str]:
    """Yield what is wrong with a module's docstrings, as `line: name: why`."""
    module = ast.parse(source)
    yield from _faults_of(module, "module", is_public=True)
    yield from _faults_within(module, "", is_public=True)


def _faults_within(
    parent: Documented | ast.stmt | ast.ExceptHandler, prefix: str, is_public: bool
) -> Iterator[str]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = prefix + node.name
            public = is_public and not node.name.startswith("_")
            yield from _faults_of(node, name, public and not _is_of_autograd(node))
            within_class = isinstance(node, ast.ClassDef)
            yield from _faults_within(node, f"{name}.", public and within_class)
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from _faults_within(node, prefix, is_public)


def _faults_of(node: Documented, name: str, is_public: bool) -> Iterator[str]:
    where = f"{getattr(node, 'lineno', 1)}: {name}"
    text = ast.get_docstring(node)
    if not text:
        if is_public:
            yield f"{where}: has no docstring"
        return
    line = text.splitlines()[0]
    word = line.split()[0].rstrip(",.:;")
    if not line.endswith((".", "?", ":")):
        yield f"{where}: {line!r} is not a whole sentence"
    if word in CLAUSE_WORDS and not (word == "Whether" and _is_bool_property(node)):
        yield f"{where}: {line!r} is a clause"
    if not isinstance(node, ast.Module | ast.ClassDef) and word in NOUN_WORDS:
        yield f"{where}: {line!r} does not begin with what it does"


def _is_bool_property(node: Documented) -> bool:
    return (
        isinstance(node, ast.FunctionDef)
        and any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        and node.returns is not None
        and ast.unparse(node.returns) == "bool"
    )


def _is_of_autograd(node: Documented) -> bool:
    """Tell whether this is `forward` or `backward` of a torch.autograd.Function: see torch."""
    return isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args[:1]] == ["ctx"]


def test_every_docstring_begins_with_a_sentence() -> None:
    package = ROOT / "megatron_laer"
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sorted(package.rglob("*.py"))
        for fault in faults(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join([f"{len(found)} docstrings:", *found])


def test_faults_are_found() -> None:
    source = '''"""What this is."""
class A:
    """Holds a
    thing."""
    @property
    def is_new(self) -> bool:
        """Whether it is new."""
    def is_old(self) -> bool:
        """Whether it is old."""
    def run(self): ...
    def _helper(self): ...
class B(Function):
    """Does nothing."""
    def forward(ctx): ...
    def backward(ctx):
        """The gradient."""
if A:
    def outer():
        """Return a function."""
        def inner(): ...
'''
    assert list(faults(source)) == [
        "1: module: 'What this is.' is a clause",
        "2: A: 'Holds a' is not a whole sentence",
        "8: A.is_old: 'Whether it is old.' is a clause",
        "10: A.run: has no docstring",
        "15: B.backward: 'The gradient.' does not begin with what it does",
    ]
