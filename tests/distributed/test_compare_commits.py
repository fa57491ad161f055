"""The comparison of two commits: a clone with one more commit that changes numbers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import compare_commits
from tests.compare_commits import main
from tests.documents import ROOT


def git(*words: str, folder: Path = ROOT) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.nightly
def test_a_commit_that_draws_other_weights_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    clone = tmp_path / "clone"
    git("clone", "--quiet", "--shared", str(ROOT), str(clone))
    with (clone / "configs" / "models" / "tiny-moe.yaml").open("a") as model:
        model.write("initialization:\n  init-method-std: 0.03\n")
    git("commit", "--quiet", "--all", "--message", "Other weights", folder=clone)
    monkeypatch.setattr(compare_commits, "ROOT", clone)
    assert main(["HEAD^", "HEAD", "--steps", "2"]) == 1
    said = capsys.readouterr().out
    shown = said.partition("adaptive: ")[2].partition("restore per step: ")[0]
    for name in ("lm loss, step 1", "grad-norm, step 1", "optimizer.", "embedding.word_embeddings"):
        assert f"\n  {name}" in shown
    assert "a key" not in shown
