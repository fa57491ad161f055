"""Stock runs are made once: a kept record is used where all that it depends on is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_laer.cpu.training import Record
from tests.parity import stock
from tests.parity.adapted import frozen_in_part
from tests.parity.stock import StockRuns, digest_of, environment

FLAGS = ["--num-layers", "2"]


class Pools:
    """Stands for rank pools, and counts the runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, _size: int) -> Pools:
        return self

    def run(self, *_: Any) -> list[Record]:
        self.runs += 1
        return [Record(losses=[float(self.runs)], weights={"w": torch.ones(3)})]


def data(folder: Path, content: bytes = b"text") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "text.bin").write_bytes(content)
    (folder / "text.idx").write_bytes(b"index")
    return str(folder / "text")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return data(tmp_path / "data")


def test_a_run_is_made_once_in_a_session_and_found_by_the_next(tmp_path: Path, prefix: str) -> None:
    pools = Pools()
    first = StockRuns(pools, prefix, tmp_path / "kept")  # type: ignore[arg-type]
    record = first(2, [*FLAGS, "--data-path", prefix], None)
    assert first(2, [*FLAGS, "--data-path", prefix], None) is record
    # The data of the next session lies elsewhere, with the same bytes.
    moved = data(tmp_path / "moved")
    then = StockRuns(pools, moved, tmp_path / "kept")  # type: ignore[arg-type]
    again = then(2, [*FLAGS, "--data-path", moved], None)
    assert (pools.runs, first.made, then.made) == (1, 1, 0)
    assert again.losses == record.losses and torch.equal(again.weights["w"], record.weights["w"])


def test_another_cause_makes_another_run(tmp_path: Path, prefix: str) -> None:
    pools = Pools()
    runs = StockRuns(pools, prefix, tmp_path / "kept")  # type: ignore[arg-type]
    runs(2, FLAGS, None)
    for size, flags, adapt in ((4, FLAGS, None), (2, FLAGS[:1], None), (2, FLAGS, frozen_in_part)):
        before = pools.runs
        runs(size, flags, adapt)
        assert pools.runs == before + 1
    other = data(tmp_path / "other", b"another text")
    StockRuns(pools, other, tmp_path / "kept")(2, FLAGS, None)  # type: ignore[arg-type]
    assert pools.runs == 5


def test_variables_that_choose_how_torch_computes_and_all_sources_are_causes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert environment({"OMP_NUM_THREADS": "1"}) != environment({})
    assert environment({"HOME": "elsewhere"}) == environment({})
    for part in ("megatron_laer/cpu/training.py ", "core/package_info.py "):
        assert any(text.startswith(part) for text in environment({}))
    changed = tmp_path / "changed.py"
    changed.write_text("one")
    monkeypatch.setattr(stock, "SOURCES", (str(changed),))
    monkeypatch.setattr(stock, "ROOT", tmp_path)
    digests = set()
    for content in ("one", "two"):
        changed.write_text(content)
        stock._sources.cache_clear()
        digests.add(digest_of(environment({})))
    stock._sources.cache_clear()
    assert len(digests) == 2
