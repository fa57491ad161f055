"""Links in documents lead to files and headings; the network is not used."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.documents import PAGES, ROOT

DOCUMENTS = (
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md",
)
_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(rf"{_BLOCK.pattern}|`[^`\n]+`", _BLOCK.flags)
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
_ELSEWHERE = ("https://", "http://")


def anchors(page: str) -> set[str]:
    """Return the names of headings after `#`: lower case, without marks, with hyphens."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", _BLOCK.sub("", page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def dead_links(path: Path) -> list[str]:
    dead = []
    for link in _LINK.findall(_CODE.sub("", path.read_text(encoding="utf-8"))):
        if link.startswith(_ELSEWHERE):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# One `word`: and two\n## Twice\n## Twice\n```text\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](other.md) [b](other.md#one-word-and-two) [c](other.md#twice-1) [d](#top)\n"
        "[e](https://nowhere) `[f](code.md)` ![g](missing.svg) [h](other.md#no-heading) [i](#x)\n"
    )
    assert dead_links(page) == ["missing.svg", "other.md#no-heading", "#x"]


def test_files_that_the_recipes_name_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
