"""The picture of the report in README and docs/report.md shows the page as it is today."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import report_picture
from scripts.report_picture import PICTURE, with_words, words_of_page, words_of_picture
from tests.recorded_runs import RUN_NUMBER, STEPS, record_run
from tests.tools.report_pages import written


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the page of a run with the names of files that the quick start gives."""
    folder = tmp_path / ".quickstart"
    record_run(folder)
    for name, begins, ms in (("fsep", f"fsep_run {RUN_NUMBER}\n", 100), ("stock", "", 150)):
        lines = (
            f" iteration {at}/ 9 | elapsed time per iteration (ms): {ms} | lm loss: 5 |\n"
            for at in range(1, STEPS + 1)
        )
        (folder / f"{name}.log").write_text(begins + "".join(lines))
    monkeypatch.chdir(tmp_path)
    return written(tmp_path, ".quickstart")


def test_the_picture_has_the_title_the_verdict_and_the_numbers_of_a_page_of_today(page: str):
    words = words_of_page(page)
    assert words.splitlines()[0] == "FSEP balance report: .quickstart"
    assert "FSEP is # times as fast as stock, measured in the iterations # to # of" in words
    assert words_of_picture(PICTURE.read_bytes()) == words, (
        "make it anew: scripts/quickstart.sh on an idle machine, then scripts/release.sh picture"
    )


def test_another_title_verdict_or_number_makes_a_picture_an_old_one(page: str):
    words = words_of_page(page)
    for old, new in (
        ("<h1>FSEP balance report: ", "<h1>"),
        ("usually too high", "right"),
        ("lost to imbalance, of", "lost, of"),
    ):
        assert old in page and words_of_page(page.replace(old, new)) != words
    assert words_of_page(page.replace("1.50 times", "12.25 times")) == words


def test_words_are_put_into_a_picture_and_found_again():
    png = PICTURE.read_bytes()
    longer = with_words(png[: png.index(b"IDAT") - 4] + png[-12:], "a # b")
    assert words_of_picture(longer) == "a # b"


def test_the_command_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_picture.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert report_picture.main([str(tmp_path / "no.html")]) == 2
    assert "no.html; run scripts/quickstart.sh" in capsys.readouterr().err
    monkeypatch.setattr(report_picture.shutil, "which", lambda name: None)
    assert report_picture.main([]) == 2
    assert "there is no chromium; install it" in capsys.readouterr().err
