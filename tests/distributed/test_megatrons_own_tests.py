"""Megatron's own unit tests of its MoE layers end as they do without the plugin.

With FSEP, only a refusal that docs/support.md names may change a result. Needs a checkout of the
installed Megatron-LM in the folder MEGATRON_LM_CHECKOUT, since no wheel holds the tests.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.checkouts import checkout
from tests.own_tests import FILES, Mode, Verdict, run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"

CHECKOUT, pytestmark = checkout("MEGATRON_LM_CHECKOUT", "the installed Megatron-LM")

# Part of the one refusal that is not about a setting.
ALONE = "its dispatcher alone"
TIMEOUT_S = 4 * 3600.0


def verdicts(mode: Mode) -> dict[str, Verdict]:
    """Return every test's verdict, and print the number of each."""
    found = run(mode, CHECKOUT, FILES, TIMEOUT_S)
    print(f"\n{mode}: {dict(Counter(verdict.outcome for verdict in found.values()))}")
    return found


def outcomes(found: dict[str, Verdict]) -> dict[str, str]:
    return {test: verdict.outcome for test, verdict in found.items()}


@pytest.fixture(scope="module")
def without() -> dict[str, Verdict]:
    """Return the verdicts without the plugin, some of which must have passed."""
    found = verdicts("without")
    assert "passed" in outcomes(found).values()
    return found


def test_the_plugin_alone_changes_no_verdict(without: dict[str, Verdict]) -> None:
    assert outcomes(verdicts("standard")) == outcomes(without)


def test_fsep_changes_verdicts_only_by_refusals_that_the_page_names(
    without: dict[str, Verdict],
) -> None:
    fsep = verdicts("fsep")
    assert fsep.keys() == without.keys()
    _, _, section = PAGE.read_text(encoding="utf-8").partition("\n## Megatron's own tests\n")
    assert section, "the section is gone from the page"
    for test, verdict in fsep.items():
        if verdict.outcome == without[test].outcome:
            continue
        reasons = "\n".join(verdict.reasons)
        fields = re.findall(r"^\s*(\w+)=.*: ", reasons, re.MULTILINE)
        named = {f"`{field}`" for field in fields} | set(re.findall(ALONE, reasons))
        assert verdict.outcome == "failed" and named, (test, without[test], verdict)
        assert {name for name in named if name not in section} == set(), (test, verdict)
