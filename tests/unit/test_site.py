"""The docs build without a warning, and pages derived from the code are up to date."""

from __future__ import annotations

import dataclasses
import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laer import environment
from megatron_laer.config import FSEPConfig
from megatron_laer.fsep_flags import help_of
from tests import site_pages
from tests.documents import ROOT
from tests.site_pages import DOCS
from tests.supervise import STATUS_VARIABLE


def test_texts_from_the_code_are_up_to_date() -> None:
    assert site_pages.old() == [], "run python -m tests.site_pages"


# Variables read by the package, by scripts and by tests.
READ = (
    r'"((?:MEGATRON_LAER|OMPI|SLURM|TORCHELASTIC|CUDA|LOCAL|TORCHDYNAMO)_[A-Z_]+|RANK|WORLD_SIZE|CXX)"',
    r"\$\{(PYTHON|CXX|TORCH_INDEX_URL|MEGATRON_[A-Z_]+)[:}]|\b(MEGATRON_LAER_[A-Z_]+)=",
    r'"((?:MEGATRON|SLIME)_[A-Z_]+)"(?:\)?\n|, )',
)


def test_every_variable_that_is_read_is_in_the_table_and_no_other() -> None:
    package = (ROOT / "megatron_laer").rglob("*.py")
    sources = (
        (path for path in package if "testing" not in path.parts),
        (ROOT / "scripts" / "environment.sh", ROOT / "scripts" / "test.sh", ROOT / ".ci" / "run"),
        (ROOT / "tests").rglob("*.py"),
    )
    read = {
        name
        for pattern, paths in zip(READ, sources, strict=True)
        for path in paths
        if path.name != "environment.py"
        for names in re.findall(pattern, path.read_text(encoding="utf-8"))
        for name in ([names] if isinstance(names, str) else names)
        if name
    }
    # Named by the table itself, and passed by the tests' supervisor to its child.
    read |= {name for name in vars(environment).values() if re.fullmatch(r"[A-Z]+_\w+", str(name))}
    read -= {STATUS_VARIABLE}
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([A-Z_]+)` \|", page[page.index("## Environment") :], re.MULTILINE)
    assert sorted(read) == sorted(listed)


def test_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = page[page.index("## While a run starts") : page.index("## Faults")].splitlines()
    quoted = {
        text
        for row in rows
        if row.startswith("| ")
        for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    }
    # A message may span several lines.
    sources = [path.read_text("utf-8") for path in (ROOT / "megatron_laer").rglob("*.py")]
    code = "\n".join(re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)
    assert len(quoted) > 10
    assert {text for text in quoted if text not in code} == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(folder / "cache"), str(DOCS), str(folder / "html")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder / "html"


def test_the_python_interface_has_every_public_name_and_setting(site: Path) -> None:
    import megatron_laer

    page = (site / "megatron.html").read_text(encoding="utf-8")
    names = set(megatron_laer.__all__) - {"__version__"}
    assert {name for name in names if f'<span class="pre">{name}</span>' not in page} == set()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    first_words = {
        field.name: " ".join(help_of(field.name).split()[:4])
        for field in dataclasses.fields(FSEPConfig)
    }
    assert {name for name, words in first_words.items() if words not in text} == set()
