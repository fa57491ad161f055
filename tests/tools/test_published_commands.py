"""The page has the verdicts that `check-recipe` gives on published commands today."""

from __future__ import annotations

from tests.parity.rows import ROWS
from tests.parity.settings import published_entries
from tests.processes import python
from tests.recipes_page import PAGE


def test_the_page_has_the_verdicts_of_published_commands():
    printed = python("-m", "tests.published_commands")
    assert len(printed.splitlines()) == 2 + len(published_entries())
    page = PAGE.read_text(encoding="utf-8")
    assert printed in page, "python -m tests.published_commands prints the table of today"


def test_every_model_has_a_command_and_what_runs_has_a_row():
    entries = published_entries()
    for (
        model
    ) in "Mixtral Qwen3-30B Qwen3-235B DeepSeek-V3 gpt-oss GLM-4.5 Kimi-K2 Nemotron-3".split():
        assert any(entry["model"].startswith(model) for entry in entries), model
    assert {entry["row"] for entry in entries if "row" in entry} <= {row.id for row in ROWS}
