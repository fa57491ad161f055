"""The benchmark of the guard's time decides in each mode as that mode does."""

from __future__ import annotations

from benchmarks import guard_speed


def test_each_mode_solves_where_it_has_to(monkeypatch):
    monkeypatch.setattr(guard_speed, "SHAPES", guard_speed.SHAPES[:1])
    monkeypatch.setattr(guard_speed, "REPEATS", 1)
    rows = {row["mode"]: row for row in guard_speed.guard_times()}
    assert len(rows) == 5
    assert rows["forecast"]["solved"] == 0 and rows["exact"]["replanned"] == 1
    assert rows["adaptive"]["replanned"] <= rows["adaptive, free links"]["replanned"]
