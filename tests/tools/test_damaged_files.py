"""Damaged files of a run are refused, or read up to the damage with a warning."""

from __future__ import annotations

import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_laer.choices import Sharding
from megatron_laer.files.checks import in_one_line
from megatron_laer.planner.cluster_files import cluster_text, load_cluster
from megatron_laer.planner.homes_file import read_homes, write_homes
from megatron_laer.planner.state import PlannerState
from megatron_laer.tools.report.metrics_recording import read_metrics
from megatron_laer.tools.report.recorded import recorded_run
from megatron_laer.tools.report.run_files import find_run
from megatron_laer.tools.traces import read_trace
from tests.fuzz import damaged
from tests.planner_states import make_state
from tests.recorded_runs import RUN, RUN_NUMBER, record_run
from tests.records import records_of, taken_apart

# A run's metrics, layouts and trace with rows, with experts at home, and a planner's state.
KINDS = ("metrics", "layouts", "trace", "home.metrics", "home.layouts", "home.trace", "state")
SEED, CHANGES = 58, 300
_SECTOR = 512


def _changes(luck: random.Random, path: Path, other: Path) -> bytes:
    """Return a changed copy; `other` is the file of that name of another run."""
    whole = path.read_bytes()
    header, *records = records_of(path)
    at, place = luck.randrange(len(records)), luck.randrange(len(whole))
    kinds: list[Callable[[], bytes]] = [
        lambda: damaged(whole, luck),
        lambda: damaged(whole, luck),
        lambda: _with(whole, place, bytes([whole[place] ^ 1 << luck.randrange(8)])),
        lambda: whole[:place],
        lambda: whole[:place] + bytes(len(whole) - place),
        lambda: whole + luck.choice((bytes(luck.randrange(1, 4096)), luck.randbytes(99))),
        lambda: _with(whole, place // _SECTOR * _SECTOR, bytes(_SECTOR)),
        lambda: header + b"".join(records[:at]),
        lambda: header + b"".join(records[at + 1 :]),
        lambda: header + b"".join((*records[:at], records[at], *records[at:])),
        lambda: header + b"".join(luck.sample(records, len(records))),
        lambda: header + b"".join((*records[:at], records_of(other)[at + 1], *records[at + 1 :])),
        lambda: records_of(other)[0] + b"".join(records),
        lambda: header,
        lambda: b"",
    ]
    return luck.choice(kinds)()


def _with(whole: bytes, at: int, part: bytes) -> bytes:
    return (whole[:at] + part + whole[at + len(part) :])[: len(whole)]


def _told(content: object) -> str:
    with np.printoptions(threshold=2**31, floatmode="unique"):
        return repr(content)


def _report(folder: Path, sharding: Sharding) -> None:
    """Read a run as `report` does."""
    files = find_run(folder, None)
    assert files.trace is not None
    recorded_run(files, read_metrics(files.metrics), read_trace(files.trace), sharding)


def _outcome(path: Path, expected: list[str], caplog: pytest.LogCaptureFixture) -> str:
    """Read a changed file as its users do; return the outcome, which is wrong after "silent"."""
    caplog.clear()
    try:
        if path.suffix == ".bin":
            PlannerState.from_bytes(path.read_bytes())
        else:
            is_home = path.parent.name == "home"
            _report(path.parent, Sharding.EXPERTS if is_home else Sharding.ROWS)
        found = [_told(of) for of in taken_apart(path)[1]]
    except ValueError as error:
        assert "Traceback" not in in_one_line(error)
        return "refused"
    warnings = [of.getMessage() for of in caplog.records if of.levelno >= logging.WARNING]
    if found == expected:
        return "equal"
    if found != expected[: len(found)]:
        return "silent: other data"
    return "warned" if any(path.name in text for text in warnings) else "silent: a prefix"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `rows` and `home`, others of the same shape, and a state."""
    top = tmp_path_factory.mktemp("runs")
    for name, number in (("", RUN_NUMBER), ("other-", RUN_NUMBER[::-1])):
        record_run(top / f"{name}rows", number=number)
        record_run(top / f"{name}home", run=RUN | {"sharding": "experts"}, number=number)
    (top / "state").mkdir()
    (top / "state" / "group-0.bin").write_bytes(make_state().to_bytes())
    return top


def _file(folder: Path, kind: str) -> Path:
    if kind == "state":
        return folder / "state" / "group-0.bin"
    run, _, suffix = kind.rpartition(".")
    return folder / (run or "rows") / f"group-0.{suffix}"


def _tried(
    folder: Path, kind: str, place: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[tuple[int, str]]:
    path = _file(folder, kind)
    other = path if kind == "state" else folder / f"other-{path.parent.name}" / path.name
    expected = [_told(of) for of in taken_apart(path)[1]]
    shutil.copytree(path.parent, place / path.parent.name)
    changed = place / path.parent.name / path.name
    for seed in range(CHANGES):
        content = whole = path.read_bytes()
        luck = random.Random(f"{SEED}, {kind}, {seed}")
        while content == whole:
            content = _changes(luck, path, other)
        changed.write_bytes(content)
        yield seed, _outcome(changed, expected, caplog)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_never_read_in_silence(
    folder: Path, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = dict(_tried(folder, kind, tmp_path, caplog))
    print(f"\n{kind}: {dict(Counter(found.values()))}")
    assert {seed: of for seed, of in found.items() if of.startswith("silent")} == {}
    assert [*found.values()].count("refused") > CHANGES / 2


def _homes(folder: Path) -> Path:
    path = folder / "homes.json"
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(16), (8, 1)), axis=1)
    write_homes(path, 4, {f"layer {number}": order_E for number, order_E in enumerate(orders)})
    return path


def _without_checksum(folder: Path) -> Path:
    path = _homes(folder)
    path.write_bytes(path.read_bytes().split(b',"crc"')[0] + b"}\n")
    return path


def _cluster(folder: Path) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(cluster_text(load_cluster("h100-8")))
    return path


@pytest.mark.parametrize(
    ("write", "read", "has_checksum"),
    [
        (_homes, read_homes, True),
        (_without_checksum, read_homes, False),
        (_cluster, load_cluster, False),
    ],
    ids=["homes", "homes without checksum", "cluster"],
)
def test_a_damaged_text_is_refused_where_it_has_a_checksum(
    tmp_path: Path,
    write: Callable[[Path], Path],
    read: Callable[[Path], object],
    has_checksum: bool,
) -> None:
    """Without one it is refused or read, by a user's own hand it may have been changed."""
    path, luck, found = write(tmp_path), random.Random(SEED), Counter[str]()
    whole, expected = path.read_bytes(), _told(read(path))
    for _ in range(CHANGES):
        path.write_bytes(damaged(whole, luck))
        try:
            found["equal" if _told(read(path)) == expected else "other"] += 1
        except ValueError as error:
            assert str(path) in str(error)
            found["refused"] += 1
    print(f"\n{path.name}: {dict(found)}")
    assert found["refused"] > CHANGES / 3
    assert not (has_checksum and found["other"])
