"""The tables of docs/support.md follow from the parity table, the refusals and figures of runs."""

from __future__ import annotations

import pytest

from megatron_laer.choices import Unproven
from megatron_laer.rules import REFUSALS
from tests.parity import report
from tests.parity.features import ALLOW, FEATURES, REPLACED
from tests.parity.report import proved_by, read_figures
from tests.parity.rows import HOME_ROWS, ROWS

WORDS = {f"{ALLOW} {word}" for word in Unproven}


def test_every_row_has_figures_and_no_other_has() -> None:
    figures = read_figures()
    rows = [*ROWS, *HOME_ROWS]
    assert list(figures) == [row.id for row in rows]
    assert len({row.id for row in rows}) == len(rows)
    assert [name for name, cells in figures.items() if not any(cells)] == []
    given = {word for row in ROWS for word in (row.flags + row.fsep).split()}
    assert REPLACED.keys() <= given


def test_the_page_lists_every_refusal_once_and_counts_rows() -> None:
    listed = [line.split("`")[1] for line in [*report.refused()][2:]]
    assert listed == [rule.setting for rule in REFUSALS]
    counts = f"{len(ROWS)} combinations are proved equal to stock, {len(HOME_ROWS)} of them with"
    assert counts in next(report.counts())


def test_features_point_at_rows_and_words_that_exist() -> None:
    there = {row.id for row in ROWS} | WORDS
    assert {name for names in FEATURES.values() for name in names} <= there


def test_a_feature_is_proved_by_what_its_rows_run_with() -> None:
    assert proved_by(["plain"]) == proved_by(["context", "bf16"]) == "CPU row"
    assert proved_by(["context"]) == "CPU row, replacement"
    assert proved_by([]) == "nothing yet"


def test_what_has_to_be_allowed_by_name_is_not_proved_until_a_card_has_run_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {name for names in FEATURES.values() for name in names} >= WORDS
    proofs = {line.split("`")[1]: line.split(" | ")[-1] for line in [*report.allowed()][2:]}
    nothing = dict.fromkeys(Unproven, "nothing yet |")
    assert proofs == nothing | {Unproven.TE_GRAPHS: "CPU row, replacement |"}
    for word in Unproven:
        assert proved_by([f"{ALLOW} {word}"]) == "nothing yet"
    seen = frozenset({"bf16", f"{ALLOW} te-graphs"})
    monkeypatch.setattr(report, "SEEN_ON_A_CARD", seen)
    assert proved_by([f"{ALLOW} te-graphs"]) == "card"
    assert proved_by(["bf16"]) == "CPU row, card"
