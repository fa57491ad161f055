"""Published tables are read from complete files that also hold other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published_files import END_TO_END, Cell, read_cells, read_tokens
from benchmarks.published_table import below, positive, read_rows, text
from tests.bad_inputs import programs


def test_rows_are_read_by_column_whatever_their_order(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\ufefftime,more,name\r\n2.5,,"a, b"\r\n3,x,c\r\n')
    found = read_rows(path, {"name": text, "time": positive}, key=("name",))
    assert found == [{"name": "a, b", "time": 2.5}, {"name": "c", "time": 3.0}]


@pytest.mark.parametrize("given", ["", "-1", "1.0", "1_0", "\u0661", "7", "9" * 30])
def test_a_whole_number_is_digits_in_range(given: str) -> None:
    assert below(7)("06") == 6
    with pytest.raises(ValueError, match=r"must be a whole number in 0\.\.6"):
        below(7)(given)


def test_whole_tables_are_read(tmp_path: Path) -> None:
    programs.make(tmp_path)
    cells = read_cells(tmp_path / "published")
    assert len(cells) == 48
    assert cells[0] == Cell("wikitext", "mixtral-8x7b-e8k2", "0.0", "megatron", 20.0)
    assert (tmp_path / "published" / END_TO_END).is_file()
    tokens = read_tokens(tmp_path / "published", {"e8k2": slice(2, 10)})
    assert {key: found.shape for key, found in tokens.items()} == {
        ("e8k2", method): (32, 8, 32) for method in ("FSDP", "FLEX", "LAER")
    }
    assert tokens["e8k2", "LAER"][3, 4, 5] == 905
