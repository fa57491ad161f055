"""The tables of docs/support.md follow from the parity table, the refusals and figures of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_laer.choices import Unproven
from megatron_laer.rules import REFUSALS
from tests.parity import report
from tests.parity.compare import Distance
from tests.parity.features import ALLOW, FEATURES, REPLACED
from tests.parity.report import figures_in, proved_by, read_figures, status, write_figures
from tests.parity.rows import ALL_ROWS, HOME_ROWS, ROWS

FOUND = Distance(grads=1e-7, losses=2e-7, norms=3e-7, weights=4e-7, logged=5e-7)
FLOOR = FOUND.times(2)
WORDS = {f"{ALLOW} {word}" for word in Unproven}


def results(tmp_path: Path, inside: str = "") -> Path:
    path = tmp_path / "results.xml"
    properties = {"row": "aux loss", "floor": str(FLOOR), "fsep": str(FOUND)}
    listed = "".join(f'<property name="{k}" value="{v}"/>' for k, v in properties.items())
    path.write_text(
        "<testsuites><testsuite><testcase name='test_fsep_equals_stock[aux loss]'>"
        f"<properties>{listed}</properties>{inside}</testcase></testsuite></testsuites>"
    )
    return path


def test_every_row_has_figures_and_no_other_has() -> None:
    figures = read_figures()
    rows = [*ROWS, *HOME_ROWS]
    assert list(figures) == [row.name for row in rows]
    assert len({row.id for row in rows}) == len(figures) == len(rows)
    assert [name for name, cells in figures.items() if not any(cells)] == []
    given = {word for row in ROWS for word in (row.flags + row.fsep).split()}
    assert REPLACED.keys() <= given


def test_the_page_lists_every_refusal_once_and_counts_rows() -> None:
    listed = [line.split("`")[1] for line in [*report.refused()][2:]]
    assert listed == [rule.setting for rule in REFUSALS]
    counts = f"{len(ROWS)} combinations are proved equal to stock, {len(HOME_ROWS)} of them with"
    assert counts in next(report.counts())


def test_features_point_at_rows_and_refusals_that_exist() -> None:
    there = {row.id for row in ROWS} | {refusal.setting for refusal in REFUSALS} | WORDS
    assert {name for names in FEATURES.values() for name in names} <= there


def test_a_feature_is_proved_by_what_its_rows_run_with() -> None:
    assert status(["plain"]) == ("proved", "CPU row")

    assert status(["context"]) == ("proved", "CPU row, replacement")
    assert status(["context", "bf16"]) == ("proved", "CPU row")
    assert status(["--fp4-format", "--fp8-param-gather"]) == ("refused", "–")
    assert status([]) == ("unproven", "nothing yet")


def test_what_has_to_be_allowed_by_name_is_not_proved_until_a_card_has_run_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {name for names in FEATURES.values() for name in names} >= WORDS
    proofs = {line.split("`")[1]: line.split(" | ")[-1] for line in [*report.allowed()][2:]}
    nothing = dict.fromkeys(Unproven, "nothing yet |")
    assert proofs == nothing | {Unproven.TE_GRAPHS: "CPU row, replacement |"}
    for word in Unproven:
        assert status([f"{ALLOW} {word}"]) == ("unproven", "nothing yet")
    seen = frozenset({"bf16", f"{ALLOW} te-graphs"})
    monkeypatch.setattr(report, "SEEN_ON_A_CARD", seen)
    assert status([f"{ALLOW} te-graphs"]) == ("proved", "card")
    assert proved_by(["bf16"]) == "CPU row, card"


def test_figures_of_a_run_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures_in(results(tmp_path))
    pairs = ((1e-7, 2e-7), (2e-7, 4e-7), (3e-7, 6e-7), (4e-7, 8e-7), (5e-7, 1e-6))
    assert found == {"aux loss": pairs}
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures.csv")
    write_figures(found | {"plain DDP": ((1e-7, 1e-8), None, (1e-7, 2e-8), None, None)})
    assert read_figures()["aux loss"] == pairs
    with pytest.raises(ValueError, match="failed"):
        figures_in(results(tmp_path, "<failure message='too far'/>"))


def test_rows_that_a_run_lacks_keep_their_figures_and_others_are_complained_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures.csv")
    before = ((9e-7, 9e-7),) * 4 + (None,)
    write_figures({"bf16": before, "aux loss": before})
    assert report.main([str(results(tmp_path))]) == 1
    assert f"no figures for {len(ALL_ROWS) - 2} rows" in capsys.readouterr().err
    after = read_figures()
    assert after["bf16"] == before
    assert after["aux loss"] == figures_in(results(tmp_path))["aux loss"]
