"""Docstrings, pages and messages keep the rules of plain English that a machine can check."""

from __future__ import annotations

import ast

from tests import style


def test_exceptions_from_the_rules_do_not_grow() -> None:
    found = style.excess(style.exceptions(), style.limits())
    assert not found, "\n".join(found)


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
