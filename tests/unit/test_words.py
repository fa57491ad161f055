"""Retired words are in no file of the project; tests/retired_words.txt lists them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.documents import ROOT, project_files

LIST = ROOT / "tests" / "retired_words.txt"
# Both have former names.
EXEMPT = (LIST, ROOT / "CHANGELOG.md")
# Boundaries between parts of an identifier; an underscore is a letter to `\b`.
_PARTS = re.compile(r"_|(?<=[a-z])(?=[A-Z])")

Rules = dict[re.Pattern[str], str]


def rules(text: str) -> Rules:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {re.compile(old): new for old, _, new in (line.partition("\t") for line in lines)}


def retired(path: Path, listed: Rules) -> list[str]:
    """Return the listed words in a file, as `file:line: word; say ...`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []  # built, or cached
    parts = _PARTS.sub(" ", text)
    found = {
        (searched.count("\n", 0, match.start()) + 1, match[0], new)
        for searched in (text, parts)
        for old, new in listed.items()
        for match in old.finditer(searched)
    }
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [f"{where}:{line}: {word!r}; say {new}" for line, word, new in sorted(found)]


def test_no_file_has_a_retired_word() -> None:
    listed = rules(LIST.read_text(encoding="utf-8"))
    files = sorted(path for path in project_files() if path not in EXEMPT)
    found = [where for path in files for where in retired(path, listed)]
    assert not found, "\n".join([f"{len(found)} lines:", *found])


def test_words_are_found_in_text_and_in_identifiers(tmp_path: Path) -> None:
    listed = rules("# a list\n(?i)\\bfoos?\\b\tbar\n\\bBaz\\b\tqux\n")
    path = tmp_path / "file.py"
    path.write_text("Foo\nmy_foo_CRK = 1\nfood, baz\nBaz\nMyFoo\n")
    assert retired(path, listed) == [
        f"{path}:1: 'Foo'; say bar",
        f"{path}:2: 'foo'; say bar",
        f"{path}:4: 'Baz'; say qux",
        f"{path}:5: 'Foo'; say bar",
    ]
