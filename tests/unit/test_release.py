"""A release is described once, and its script and workflow fit."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

import megatron_laer
from tests.documents import ROOT
from tests.unit.shell_scripts import fake_python, shell

VERSION = megatron_laer.__version__
SCRIPT = ROOT / "scripts" / "release.sh"
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


JOBS = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].items()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("scripts/release.sh", "megatron_laer/version.py", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def release(top: Path, *words: str, **environment: str) -> Any:
    return shell(top / "scripts" / "release.sh", *words, cwd=top, **environment)


def date(checkout: Path, text: str) -> None:
    path = checkout / "CHANGELOG.md"
    path.write_text(re.sub(r"^## .*$", text, path.read_text(), count=1, flags=re.MULTILINE))


def test_version_and_changelog_agree(checkout: Path) -> None:
    result = shell(SCRIPT, "check")
    assert (result.returncode, result.stdout) == (0, f"version {VERSION}\n"), result.stderr
    date(checkout, f"## {VERSION} (2026-12-31)")
    result = release(checkout, "check", f"v{VERSION}")
    assert result.stdout == f"version {VERSION}, tag v{VERSION}\n", result.stderr


@pytest.mark.parametrize(
    ("heading", "tag", "says"),
    [
        (f"## {VERSION} (2026-12-31)", "v9.9.9", f"the tag 'v9.9.9' is not v{VERSION}"),
        (f"## {VERSION} (2026-12-31)", VERSION, f"the tag '{VERSION}' is not v{VERSION}"),
        (f"## {VERSION} (not released)", f"v{VERSION}", "give the day, as in"),
        ("## 9.9.9 (2026-12-31)", f"v{VERSION}", "CHANGELOG.md begins with '## 9.9.9 (2026"),
    ],
)
def test_what_does_not_agree_is_quoted(heading: str, tag: str, says: str, checkout: Path) -> None:
    date(checkout, heading)
    result = release(checkout, "check", tag)
    assert result.returncode == 2 and says in result.stderr
    date(checkout, f"## {VERSION} (2026-12-31)")
    (checkout / "CITATION.cff").write_text("version: 9.9.9\n")
    assert "CITATION.cff has another version" in release(checkout, "check").stderr


def test_the_index_gets_the_files_and_the_release_page_the_changes(checkout: Path) -> None:
    date(checkout, f"## {VERSION} (2026-12-31)")
    changes = checkout / "CHANGELOG.md"
    changes.write_text(f"{changes.read_text()}\n## 0.0.1 (2025-12-31)\n\n- Older.\n")
    tools = checkout / "build" / "publish-tools" / "bin"
    tools.mkdir(parents=True)
    (checkout / "dist").mkdir()
    (checkout / "dist" / "a.whl").touch()
    fake_python(tools, "twine", 'echo "twine $*"')
    fake_python(tools, "gh", 'echo "gh $*"; cat')
    published = release(checkout, "publish", f"v{VERSION}")
    said, twine = published.stdout.splitlines()
    assert said.startswith("version") and twine == "twine upload dist/a.whl"
    result = release(checkout, "page", f"v{VERSION}", PATH=f"{tools}:{os.environ['PATH']}")
    _, gh, *notes = result.stdout.splitlines()
    assert gh.startswith(f"gh release create v{VERSION} --verify-tag") and gh.endswith("dist/a.whl")
    first = changes.read_text().split("\n## ")[1].splitlines()[1:]
    assert "\n".join(notes).strip() == "\n".join(first).strip() and "Older" not in result.stdout
    assert release(checkout, "publish").returncode != 0
    assert "upload" not in release(checkout, "publish", "v9.9.9").stdout
    assert "create" not in release(checkout, "page", "v9.9.9").stdout


def test_the_workflow_runs_the_scripts_commands_in_their_order() -> None:
    found = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in JOBS}
    commands = [line.split()[1] for lines in found.values() for line in lines]
    assert commands == ["check", "sdist", "try", "wheels", "try", "publish", "page"]
    documented = re.findall(r"^#   scripts/release\.sh (\w+)", SCRIPT.read_text(), re.MULTILINE)
    assert {*commands, "wheel", "picture"} == {*documented}
    # A run by hand can have a tag too, and must publish nothing.
    pushed = "github.event_name == 'push' && github.ref_type == 'tag'"
    assert {name for name, job in JOBS if job.get("if") == pushed} == {"publish", "page"}
    built = PROJECT["tool"]["cibuildwheel"]["build"]
    tried = dict(JOBS)["try"]["strategy"]["matrix"]["python"]
    assert built == [f"cp{version.replace('.', '')}-*" for version in tried]


def test_what_is_tried_without_torch_has_the_bounds_of_the_package() -> None:
    (names,) = re.findall(r"\\\(((?:\w+\\\|)+\w+)\\\)", SCRIPT.read_text())
    needed = {re.split("[><=]", name)[0] for name in PROJECT["project"]["dependencies"]}
    assert {*names.split("\\|")} == needed - {"torch", "megatron-core"}


def test_links_of_the_readme_lead_to_the_repository_on_the_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def described() -> str:
        runpy.run_path(str(ROOT / "setup.py"))
        return str(given["long_description"])

    monkeypatch.delenv("LAER_REPOSITORY_URL", raising=False)
    assert described() == text
    monkeypatch.setenv("LAER_REPOSITORY_URL", "https://h/o/r")
    links = re.findall(r"\]\(([^)]+)\)", described())
    assert f"https://h/o/r/blob/v{VERSION}/docs/from_0_to_64.md" in links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", text))
