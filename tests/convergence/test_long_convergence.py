"""In 2,000 steps a small model learns real text with FSEP as with stock (docs/performance.md)."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks import convergence
from benchmarks.convergence_results import checks
from tests.documents import COMMANDS, ROOT, blocks

_PROGRAM = ["python", "-m", "benchmarks.convergence"]


@pytest.mark.nightly
def test_the_command_of_the_page_finds_that_all_learn_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "performance.md"
    commands = [block.text for block in blocks(page) if block.language == COMMANDS]
    (text,) = [text for text in commands if "benchmarks.convergence" in text]
    words = shlex.split(text, comments=True)
    assert words[:3] == _PROGRAM and "--steps" in words
    steps = int(words[words.index("--steps") + 1])
    assert steps >= 2000

    monkeypatch.chdir(tmp_path)
    assert convergence.main(words[3:]) == 0
    runs = convergence.read(Path(words[words.index("--json") + 1]), steps)
    assert [check.sentence for check in checks(runs) if not check.holds] == []
