"""Rules of plain English that a machine can check, with a count of today's exceptions.

`python -m tests.style` lists the exceptions; a count of `style_limits.csv` never grows.
"""

from __future__ import annotations

import ast
import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.documents import PAGES, ROOT

LIMITS = Path(__file__).with_name("style_limits.csv")
MOST_WORDS = 25

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Exceptions by rule and room, each as `file:line: text`.
Exceptions = dict[tuple[str, str], list[str]]

# A clause, or a verb of talk, instead of the verb of the field.
_RETIRED_FIRST = frozenset(
    "Say Says Tell Tells Take Takes Give Gives Is Are Has Let Lets "
    "What Which Whose How Why Of".split()
)
# First words of a noun phrase, with which no function begins; ruff finds verbs of another mood.
_NOUNS = frozenset("A All An Each Every One That The This Those".split())
# Words for which the field has others.
_RETIRED = re.compile(r"\b(?:beside|likewise|mend(?:s|ed)?|nobody|told|whoever)\b", re.IGNORECASE)
# Words with which a message names a remedy, where no semicolon precedes one.
_REMEDY = re.compile(
    r"; |\b(add|at least|at most|choose|expected|give|install|known are|known:|leave|load|must|"
    r"need|needs|one of|pass|remove|run|see|set|start|take|use|write)\b"
)
_FENCE = re.compile(r"^ *```.*?^ *```$|<!--.*?-->", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`]+`|\[([^]]*)\]\([^)]*\)")
_ITEM = re.compile(r"^ *(?:[*-]|\d+\.) +")
_END = re.compile(r"(?<=[.?!])[*_)\"']*\s+")


def long_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text with too many words; code and a link are a word each."""
    for paragraph in _paragraphs(text):
        for sentence in _END.split(_CODE.sub(lambda match: match[1] or "code", paragraph)):
            if len(re.findall(r"\S*\w\S*", sentence)) > MOST_WORDS:
                yield sentence.strip()


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*_FENCE.sub("\n\n", text).splitlines(), ""]:
        stripped = line.strip()
        if not stripped or stripped.startswith(("|", "#", "!", ">")) or _ITEM.match(line):
            yield " ".join(lines)
            lines = []
        if not stripped.startswith(("|", "#", "!", ">")):
            lines.append(_ITEM.sub("", stripped))
    yield " ".join(lines)


def docstrings(module: ast.Module) -> Iterator[tuple[Documented, str]]:
    for node in ast.walk(module):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield node, text


def first_word(text: str) -> str:
    return text.split()[0].rstrip(",.:;")


def without_remedy(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the literal messages of ValueErrors that name no remedy, with their lines."""
    for node in ast.walk(module):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError"), args=[message, *_])):
                words = [
                    part.value
                    for part in ast.walk(message)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                text = "".join(words)
                is_whole = isinstance(message, ast.Constant | ast.JoinedStr) and " " in text
                if is_whole and not _REMEDY.search(text):
                    yield node.lineno, text


def exceptions() -> Exceptions:
    found: Exceptions = defaultdict(list)
    for path in sorted((ROOT / "megatron_laer").rglob("*.py")):
        name = path.relative_to(ROOT)
        room = "/".join(name.parts[:2])
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node, text in docstrings(module):
            where = f"{name}:{getattr(node, 'lineno', 1)}"
            found["docstring sentence", room] += [f"{where}: {s}" for s in long_sentences(text)]
            found["docstring word", room] += [f"{where}: {w}" for w in _RETIRED.findall(text)]
            nouns = frozenset() if isinstance(node, ast.Module | ast.ClassDef) else _NOUNS
            if first_word(text) in _RETIRED_FIRST | nouns:
                found["docstring first word", room].append(f"{where}: {text.splitlines()[0]}")
        for line, text in without_remedy(module):
            found["error without remedy", room].append(f"{name}:{line}: {text}")
    for page in PAGES:
        name = page.relative_to(ROOT)
        text = page.read_text(encoding="utf-8")
        found["page sentence", str(name)] += [f"{name}: {s}" for s in long_sentences(text)]
        found["page word", str(name)] += [f"{name}: {word}" for word in _RETIRED.findall(text)]
    return found


def limits(path: Path = LIMITS) -> dict[tuple[str, str], int]:
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["rule"], row["room"]): int(row["allowed"]) for row in csv.DictReader(file)}


def excess(found: Exceptions, allowed: dict[tuple[str, str], int]) -> list[str]:
    return [
        line
        for key, items in sorted(found.items())
        if len(items) > allowed.get(key, 0)
        for line in (f"{key[0]}, {key[1]}: {len(items)}, and {allowed.get(key, 0)} may be", *items)
    ]


if __name__ == "__main__":
    print("\n".join(line for items in exceptions().values() for line in items))
