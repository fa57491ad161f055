"""Files for pre-commit, the hosting platform and citation tools agree with the project."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import KINDS
from tests.documents import PAGES, ROOT, project_files

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# A longer file states why it is not split.
MOST_LINES = 400
OVER = re.compile(rf"^(?:# |// )?Over {MOST_LINES} lines: \S.*\.$", re.MULTILINE)
SOURCES = {".py", ".cpp", ".hpp", ".sh", ".sbatch"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_hooks_run_every_linter_of_the_test_script() -> None:
    script = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    checks = re.findall(r'^check "?((?<=")[^"]+|\w+)"? ', script, re.MULTILINE)
    assert len(checks) >= 4
    assert {*checks, "import-linter"} <= {hook["name"] for hook in repository["hooks"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_pins_what_it_uses(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    uses = [step["uses"] for step in steps if "uses" in step]
    assert [action for action in uses if not re.fullmatch(r"actions/[\w-]+@v\d+", action)] == []
    # The workflows hold no logic: their commands can be run by hand.
    ours = r"(scripts/(test|release)\.sh|\.ci/run)\b"
    programs = [re.search(ours, step["run"]) for step in steps if "run" in step]
    assert programs and all(programs)
    # Jobs that write are separate, and wait for a person's approval.
    writing = {name: job for name, job in workflow["jobs"].items() if "permissions" in job}
    assert {*writing} <= {"publish", "page"}
    assert all(job["environment"] and job["if"] for job in writing.values())
    # A program installed under one right must not find another.
    rights = [[*job["permissions"].values()].count("write") for job in writing.values()]
    assert rights == [1] * len(writing)


def test_a_file_of_many_lines_says_why_it_is_not_split() -> None:
    texts = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8")
        for path in project_files()
        if path.suffix in SOURCES
    }
    long = {path for path, text in texts.items() if text.count("\n") > MOST_LINES}
    assert long == {path for path, text in texts.items() if OVER.search(text)}


LIST = ROOT / "tests" / "retired_words.txt"
# Both have former names.
EXEMPT = (LIST, ROOT / "CHANGELOG.md")
# Boundaries between parts of an identifier; an underscore is a letter to `\b`.
_PARTS = re.compile(r"_|(?<=[a-z])(?=[A-Z])")


def retired(path: Path, listed: dict[re.Pattern[str], str]) -> list[str]:
    """Return the listed words in a file, as `file:line: word; say ...`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []  # built, or cached
    found = {
        (searched.count("\n", 0, match.start()) + 1, match[0], new)
        for searched in (text, _PARTS.sub(" ", text))
        for old, new in listed.items()
        for match in old.finditer(searched)
    }
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [f"{where}:{line}: {word!r}; say {new}" for line, word, new in sorted(found)]


def test_no_file_has_a_retired_word(tmp_path: Path) -> None:
    lines = [line.partition("\t") for line in LIST.read_text("utf-8").splitlines()]
    listed = {re.compile(old): new for old, _, new in lines if old and not old.startswith("#")}
    files = sorted(path for path in project_files() if path not in EXEMPT)
    found = [where for path in files for where in retired(path, listed)]
    assert not found, "\n".join([f"{len(found)} lines:", *found])
    # Words are found in text and in identifiers.
    path = tmp_path / "file.py"
    path.write_text("Foo\nmy_foo_CRK = 1\nfood, baz\nBaz\nMyFoo\n")
    found = retired(path, {re.compile(r"(?i)\bfoos?\b"): "bar", re.compile(r"\bBaz\b"): "qux"})
    expected = [(1, "Foo", "bar"), (2, "foo", "bar"), (4, "Baz", "qux"), (5, "Foo", "bar")]
    assert found == [f"{path}:{line}: {word!r}; say {new}" for line, word, new in expected]


OTHERS = ("CHANGELOG.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md")
DOCUMENTS = (*PAGES, *(ROOT / other for other in OTHERS))
_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(rf"{_BLOCK.pattern}|`[^`\n]+`", _BLOCK.flags)
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


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
        if link.startswith(("https://", "http://")):
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


def test_a_days_reading_is_a_day_long() -> None:
    page = (ROOT / "docs" / "internals" / "architecture.md").read_text(encoding="utf-8")
    reading = page[page.index("## A day's reading") : page.index("## Rooms")]
    files = [ROOT / name for name in re.findall(r"^\d+\. `([^`]+)`: ", reading, re.MULTILINE)]
    assert [path.name for path in files if not path.is_file()] == []
    assert 12 <= len({*files}) <= 15
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in files) <= 3000


def test_every_registered_marker_is_on_a_test_and_every_folder_a_kind() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]
    markers = {re.split("[:(]", marker)[0] for marker in options["ini_options"]["markers"]}
    paths = [*ROOT.glob("tests/**/test_*.py")]
    folders = {path.parent.name for path in paths}
    assert folders - {"tools", "fake_cuda"} == {*KINDS}, "the latter's are marked"
    sources = "\n".join(path.read_text("utf-8") for path in paths)
    used = {marker for marker in markers if f"pytest.mark.{marker}" in sources}
    assert markers - used - folders == set()
