"""The page has the verdicts that `check-recipe` gives on published commands today."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.parity.rows import ROWS
from tests.parity.settings import published_entries
from tests.processes import python_path
from tests.recipes_page import PAGE

ENVIRONMENT = os.environ | {"PYTHONPATH": python_path(), "MEGATRON_LAER_DEVICE": "cpu"}


def test_the_page_has_the_verdicts_of_published_commands():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.published_commands"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2 + len(published_entries())
    page = PAGE.read_text(encoding="utf-8")
    assert result.stdout in page, "python -m tests.published_commands prints the table of today"


def test_every_model_has_a_command_and_what_runs_has_a_row():
    entries = published_entries()
    for (
        model
    ) in "Mixtral Qwen3-30B Qwen3-235B DeepSeek-V3 gpt-oss GLM-4.5 Kimi-K2 Nemotron-3".split():
        assert any(entry["model"].startswith(model) for entry in entries), model
    assert {entry["row"] for entry in entries if "row" in entry} <= {row.id for row in ROWS}
