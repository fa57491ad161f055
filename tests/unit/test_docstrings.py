"""Docstrings, pages and messages keep the rules of plain English that a machine can check."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests import style
from tests.documents import ROOT

# First words of a name or a clause, which state nothing.
CLAUSE_WORDS = frozenset({"What", "Which", "Whose", "Whether", "How", "Why", "Of"})
# First words of a noun phrase; a function's first line starts with a verb.
NOUN_WORDS = frozenset({"A", "All", "An", "Each", "Every", "One", "That", "The", "This", "Those"})


def faults(source: str) -> Iterator[str]:
    """Yield the faults of a module's docstrings, as `line: name: why`.

    Modules and public classes need a docstring; functions may go without.
    """
    module = ast.parse(source)
    documented = dict(style.docstrings(module))
    for node in [module, *ast.walk(module)][1:]:
        is_public = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        if (is_public or node is module) and node not in documented:
            yield f"{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'module')}: no docstring"
    for node, text in documented.items():
        line, word = text.splitlines()[0], style.first_word(text)
        where = f"{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'module')}: {line!r}"
        if not line.endswith((".", "?", ":")):
            yield f"{where} is not a whole sentence"
        if word in CLAUSE_WORDS and not (word == "Whether" and _is_property(node)):
            yield f"{where} is a clause"
        if not isinstance(node, ast.Module | ast.ClassDef) and word in NOUN_WORDS:
            yield f"{where} does not begin with a verb"


def _is_property(node: style.Documented) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        "property" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def test_every_docstring_begins_with_a_sentence() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sorted((ROOT / "megatron_laer").rglob("*.py"))
        for fault in faults(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join([f"{len(found)} docstrings:", *found])


def test_exceptions_from_the_rules_do_not_grow() -> None:
    found = style.excess(style.exceptions(), style.limits())
    assert not found, "\n".join(found)


def test_faults_are_found() -> None:
    source = '''"""What this is."""
class A:
    """Holds a
    thing."""
    @property
    def is_new(self) -> bool:
        """Whether it is new."""
class B: ...
class _C: ...
def gradient():
    """The gradient."""
'''
    assert list(faults(source)) == [
        "8: B: no docstring",
        "1: module: 'What this is.' is a clause",
        "2: A: 'Holds a' is not a whole sentence",
        "10: gradient: 'The gradient.' does not begin with a verb",
    ]


def test_long_sentences_first_words_and_messages_without_remedy_are_found() -> None:
    words = "word " * 24
    item = f"* {words}`a b c` [d e](f.md) end."
    text = f"# Title\n\n{words}end. Short.\n\n{item}\n| {words} {words}|\n"
    assert list(style.long_sentences(text)) == [f"{words}code d e end."]
    assert list(style.long_sentences(f"```text\n{words} {words}\n```\n")) == []
    assert style.first_word("Return, or not.") == "Return"
    source = 'raise ValueError(f"{a} is wrong here")\nraise ValueError("bad thing; give another")\n'
    assert list(style.without_remedy(ast.parse(source))) == [(1, " is wrong here")]
    found = {("rule", "a"): ["1", "2"], ("rule", "b"): ["3"]}
    allowed = {("rule", "a"): 1, ("rule", "b"): 5}
    assert style.excess(found, allowed) == ["rule, a: 2, and 1 may be", "1", "2"]
